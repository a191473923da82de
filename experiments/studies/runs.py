"""Where a study that trains keeps its runs."""

from absl import flags

RUNS = flags.DEFINE_string("runs", None, "Folder of the runs. If it holds some, they continue.", required=True)
