"""`--config` and its overrides mean what `ml_collections.config_flags` made of them."""

import pytest

from configs import tiny
from deepseek_jax.config import from_config_dict, to_dict
from experiments import recipe


def read(text, *words):
    rest = recipe.take_overrides(["command", *words])
    return recipe.read(text, recipe.Recipe.overrides), rest


def test_a_file_without_overrides():
    tree, rest = read("configs/tiny.py", "--workdir=W", "word")
    assert from_config_dict(tree) == from_config_dict(tiny.get_config())
    assert rest == ["command", "--workdir=W", "word"]


def test_text_after_the_colon_is_an_argument_and_a_name_may_have_a_colon(tmp_path):
    (path := tmp_path / "10:15:00").mkdir()
    (path / "c.py").write_text("def get_config(a='none'):\n    return {'name': a}\n")
    assert read(str(path / "c.py"))[0].name == "none"
    assert read(f"{path / 'c.py'}:some:where")[0].name == "some:where"
    assert read(f"tests/training/nano.py:{tmp_path}")[0].data.sources[0]["path"] == str(tmp_path)


def test_one_source_of_several_takes_another_path():
    tree, _ = read("configs/tiny.py", "--config.data.sources[0].path=x")
    assert [source.path for source in from_config_dict(tree).data.sources] == ["x"]


def test_a_key_that_the_file_leaves_out_is_set_where_it_has_the_section(tmp_path):
    (path := tmp_path / "c.py").write_text("def get_config():\n    return {'execution': {'remat': 'full'}}\n")
    assert read(str(path), "--config.execution.interleave=2")[0].execution.interleave == 2
    with pytest.raises(ValueError, match=r"--config.mesh.data does not fit the file's configuration \(KeyError\)"):
        read(str(path), "--config.mesh.data=2")


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--config.model.num_layers=8"], "model.num_layers", 8),
        (["--config.model.num_layers", "8"], "model.num_layers", 8),
        (["-config.model.num_layers=0x10"], "model.num_layers", 16),
        (["--config.model.num_layers=8", "--config.model.num_layers=9"], "model.num_layers", 9),
        (["--config.training.num_tokens=500"], "training.num_tokens", 500.0),
        (["--config.training.num_tokens=1e6"], "training.num_tokens", 1e6),
        (["--config.name=a=b"], "name", "a=b"),
        (["--config.data.tokenizer=None"], "data.tokenizer", "None"),
        (["--config.model.yarn.enabled"], "model.yarn.enabled", True),
        (["--noconfig.model.normalize_gates"], "model.normalize_gates", False),
        (["--config.model.normalize_gates=False"], "model.normalize_gates", False),
        (["--config.optimizer.learning_rate=1e-3"], "optimizer.learning_rate", [["constant", 1.0, 1e-3]]),
        (
            ["--config.optimizer.learning_rate=(('linear', 0.5, 1e-3), ('cosine', 1.0, 1e-4))"],
            "optimizer.learning_rate",
            [["linear", 0.5, 1e-3], ["cosine", 1.0, 1e-4]],
        ),
        (
            [
                "--config.optimizer.learning_rate=(('linear', 0.5, 1e-3),)",
                "--config.optimizer.learning_rate=(('cosine', 1.0, 1e-4),)",
            ],
            "optimizer.learning_rate",
            [["linear", 0.5, 1e-3], ["cosine", 1.0, 1e-4]],
        ),
        (["--config.data.sources=({'path': 'a'},)"], "data.sources", [{"path": "a", "weight": 1.0, "text_field": ""}]),
        (["--config.data.sources=my texts"], "data.sources", [{"path": "my texts", "weight": 1.0, "text_field": ""}]),
        (["--config.mesh={'pipe': 1, 'data': 1, 'node': 1, 'expert': 2, 'tensor': 1}"], "mesh.expert", 2),
    ],
)
def test_an_override_is_the_value_of_its_field(words, key, value):
    tree, rest = read("configs/tiny.py", *words)
    found = to_dict(from_config_dict(tree))
    for name in key.split("."):
        found = found[name]
    assert rest == ["command"]
    assert (
        [list(item) if isinstance(item, tuple) else item for item in found] == value
        if isinstance(value, list)
        else found == value
    )
