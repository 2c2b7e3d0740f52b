"""`python -m kimi_jax.plan`: its output, and what it refuses."""

import json
import shutil

import pytest

from kimi_jax import plan


def test_only_config_json_is_read(place, capsys):
    """Before a download is finished, and without tokenizer, weights, index or rows."""
    for path in place.checkpoint.iterdir():
        if path.name != "config.json":
            path.unlink()
    place.rows.unlink()
    before = place.contents()
    plan.main(["--config", str(place.config), "--json"])
    assert place.contents() == before
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 1
    assert found["fits"] is True
    assert found["parameters"]["trained"] > 0
    assert {option["device"] for option in found["elsewhere"]} >= {"H200", "H100", "B200"}


def test_tables_and_picture(place, capsys, tmp_path):
    picture = tmp_path / "plan.png"
    arguments = ["--config", str(place.config), "--device", "40GB", "--picture", str(picture)]
    plan.main([*arguments, "train.micro_batch=4"])
    out = capsys.readouterr().out
    assert "packed experts" in out
    assert "Fits: 4 rows of 48" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_on_other_devices(place, capsys):
    plan.main(["--config", str(place.config), "--devices", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["expert"], found["micro_batch"]) == (4, 8)


def test_a_run_that_does_not_fit_is_told_not_refused(place, capsys):
    """What does not fit is what one asks a plan."""
    plan.main(["--config", str(place.config), "--device", "1GB"])
    assert "Does not fit: 2 rows of 48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "H201"], "device 'H201' is not known; required: one of H200"),
        (["--devices", "3"], "mesh.expert = 3 cannot carry this checkpoint"),
        (["--devices", "0"], "0 devices; required: at least 1"),
        (["--picture", "plan.txt"], "its ending must be one of"),
        (["mesh.expert=2", "train.micro_batch=3"], "train.micro_batch is 3; it must be a multiple"),
        (["lora.targets=[router]"], "lora.targets: nothing to adapt"),
        (["--topology", "2x8"], "as many together as mesh.data × mesh.expert = 1 × 1"),
        (["--compile", "--device", "B200"], "there is no description of B200 to compile for"),
    ],
)
def test_refusals(place, refused, arguments, message):
    before = place.contents()
    assert message in refused(plan, "--config", place.config, *arguments)
    assert place.contents() == before


def test_no_architecture(place, refused):
    shutil.rmtree(place.checkpoint)
    assert "no such checkpoint directory" in refused(plan, "--config", place.config)
