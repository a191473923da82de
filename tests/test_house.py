"""The house: which room may import which, and how large functions and files may grow. Read, never run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room may import rooms further down, never those beside it or above.
FLOORS = [
    {"experiments"},
    {"evaluation", "plan", "posttraining"},
    {"training", "serving"},
    {"inference", "huggingface"},
    {"model"},
    {"parallel", "data"},
    {"adapters"},
    {"parameters", "safetensors"},
    {"files", "locks", "storage", "config", "progress"},
    {"config_checks"},
    {"config_bounds", "pipeline"},
    {"inputs", "palette", "schedule"},
    {"pallas_kernels"},
]
FLOOR_OF = {room: -height for height, rooms in enumerate(FLOORS) for room in rooms}

MOST_LINES_OF_A_FILE = 300
MOST_LINES_OF_A_FUNCTION, MOST_LINES_IN_A_KERNEL = 60, 90
SOURCES = sorted(
    path
    for folder in ("deepseek_jax", "pallas_kernels", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def room_of(module: str) -> str | None:
    """Return the room of one of our modules; the package `deepseek_jax` itself is a page of words."""
    parts = module.split(".")
    if parts[0] == "deepseek_jax":
        return parts[1] if len(parts) > 1 else None
    return parts[0]


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Return our modules that a file imports; without `everywhere` only where it is loaded, not inside functions."""
    tree = ast.parse(path.read_text())
    type_checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    modules = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if node in type_checking:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else node.module for name in inner}
    return {name for name in modules if name in MODULES}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_room_imports_only_rooms_below(path):
    room = room_of(module_of(path))
    for module in imports(path):
        other = room_of(module)
        assert other in (room, None) or FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {module}"


def test_no_module_imports_itself_by_a_detour():
    """Not even inside functions."""
    below = {module: imports(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in below[module]:
                visit(other, [*trail, module])
            done.add(module)

    for module in below:
        visit(module, [])


def test_kernels_know_nothing_of_the_model():
    assert not [
        name_of(path)
        for path in SOURCES
        if path.is_relative_to(ROOT / "pallas_kernels")
        and any(room_of(module) != "pallas_kernels" for module in imports(path))
    ]


def test_configs_are_data():
    for path in (ROOT / "configs").glob("*.py"):
        names = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert names <= {"ml_collections", "configs"}, path.name


# (file, attribute) of the objects of libraries that are configured so. Attributes of our own objects belong to their
# class: one that is set from outside may be one that nothing reads.
SET_FROM_OUTSIDE = {
    ("data/bpe.py", "decoder"),
    ("data/bpe.py", "pre_tokenizer"),
    ("training/interruption.py", "unraisablehook"),
    ("training/journal.py", "propagate"),
    ("data/chat.py", "data"),
    ("data/chat.py", "value"),
    ("data/encoders.py", "encode_special_tokens"),
    ("data/tiktoken.py", "decoder"),
    ("data/tiktoken.py", "pre_tokenizer"),
    ("data/tokenizer.py", "encode_special_tokens"),
    ("data/tokenizer.py", "special"),
    ("benchmarks/breakdown.py", "host_tracer_level"),
    ("benchmarks/engine_target.py", "decoder"),
    ("benchmarks/breakdown.py", "python_tracer_level"),
    ("benchmarks/layer_benchmark.py", "precision"),
    ("benchmarks/training_step.py", "batch_size"),
    ("experiments/command.py", "args"),
    ("experiments/command.py", "msg"),
    ("experiments/config_file.py", "__file__"),
    ("experiments/program_cache.py", "put"),
    ("experiments/recipe.py", "overrides"),
    ("experiments/session.py", "restype"),
    ("huggingface/companions.py", "post_processor"),
    ("pallas_kernels/dispatch.py", "__name__"),
    ("lowering/export_cache.py", "__name__"),
    ("lowering/layout_inference.py", "compute_transitively_equal_vars"),
    ("serving/app.py", "redirect_slashes"),
    ("studies/activation_study.py", "kv_latent"),
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_attribute_is_set_from_outside(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) != "self":
            assert (f"{path.parent.name}/{path.name}", node.attr) in SET_FROM_OUTSIDE, ast.unparse(node)


@pytest.mark.parametrize(
    "module",
    [
        "deepseek_jax.config",
        "deepseek_jax.safetensors.folder",
        "deepseek_jax.data.chat",
        "deepseek_jax.inference.scheduler",
        "deepseek_jax.posttraining.rewards.pool",
        "deepseek_jax.posttraining.rewards.code",
        "deepseek_jax.posttraining.tasks",
    ],
)
def test_what_needs_no_jax_imports_none(module):
    program = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    in_kernels = path.is_relative_to(ROOT / "pallas_kernels")
    longest = MOST_LINES_IN_A_KERNEL if in_kernels else MOST_LINES_OF_A_FUNCTION
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= longest, node.name


@pytest.mark.xdist_group("house")
def test_a_group_of_tests_is_one_to_the_scheduler(request):
    """xdist knows a group by the end of the node id alone; without it the tests run in any worker."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("no worker of xdist")
    assert request.node.nodeid.endswith("@house")
