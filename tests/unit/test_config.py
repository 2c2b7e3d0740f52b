"""The configuration refuses: unknown, missing, mistyped and contradictory values, all in one message."""

import pytest
import yaml

from kimi_jax.config import RunConfig
from kimi_jax.config_file import dump_config, load_config
from kimi_jax.errors import MissingFileError, UserError

GOOD = """\
run:
  dir: out
  seed: 0
model:
  checkpoint: demo
lora:
  rank: 8
  alpha: 16
  targets: [attention, routed]
data:
  train: rows.jsonl
train:
  steps: 10
  learning_rate: 1e-3
  micro_batch: 2
  accumulate: 1
  sequence_length: 64
"""


@pytest.fixture
def load(tmp_path):
    """Loads a file of this text, with overrides."""

    def load_text(text=GOOD, *overrides):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def refusal(load):
    """The message with which this text, or these overrides, are refused."""

    def message(text=GOOD, *overrides):
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return message


def test_values_arrive(load):
    config = load()
    assert config.run.dir == "out"
    assert config.lora.targets == ("attention", "routed")
    assert config.lora.alpha == 16.0
    assert config.train.learning_rate == 1e-3
    assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("2.5e-4", 2.5e-4),
        (".5e-2", 0.005),
        ("5.e-3", 0.005),
        ("1", 1.0),
    ],
)
def test_numbers(load, text, value):
    """PyYAML reads 1e-5 as a string."""
    assert load(GOOD.replace("1e-3", text)).train.learning_rate == value
    assert load(GOOD, f"train.learning_rate={text}").train.learning_rate == value


@pytest.mark.parametrize("text", ["-e5", "e5", ".e5", "1e", "1e5x"])
def test_words_that_look_like_numbers_stay_words(load, text):
    assert load(GOOD, f"run.dir={text}").run.dir == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train.lerning_rate=1", "train.lerning_rate: unknown key; did you mean learning_rate?"),
        ("lora.r=1", "lora.r: unknown key; known here: rank, alpha, targets"),
        ("trian.steps=1", "trian: unknown key; did you mean train?"),
        ("evaluate.loss_evry=1", "evaluate.loss_evry: unknown key; did you mean loss_every?"),
        ("train.steps=ten", "train.steps: Input should be a valid integer; found 'ten'"),
        ("train.steps=1.0", "train.steps: Input should be a valid integer; found 1.0"),
        ("train.steps=true", "train.steps: Input should be a valid integer; found True"),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1; found 0"),
        ("train.steps=null", "train.steps: Input should be a valid integer; found None"),
        ("train.learning_rate=fast", "train.learning_rate: Input should be a valid number"),
        ("train.learning_rate=0", "train.learning_rate: Input should be greater than 0"),
        ("train.learning_rate=.nan", "train.learning_rate: Input should be a finite number"),
        ("train.learning_rate=1e400", "train.learning_rate: Input should be a finite number"),
        ("train.sequence_length=1", "train.sequence_length: Input should be greater than or equal"),
        (
            "train.schedule=linaer",
            "train.schedule: Input should be 'constant', 'linear' or 'cosine'",
        ),
        ("train.recompute=all", "train.recompute: Input should be 'none' or 'layer'"),
        ("train.keep=[weights]", "train.keep.0: Input should be 'stream', 'latents'"),
        (
            "train.offload=[latents, latents]",
            "train: offload names something twice: latents, latents",
        ),
        ("train.beta2=1", "train.beta2: Input should be less than 1"),
        ("train.clip_norm=0", "train.clip_norm: Input should be greater than 0"),
        ("train.warmup_steps=10", "train: warmup_steps is 10; it must be less than steps, 10"),
        ("run.seed=-1", "run.seed: Input should be greater than or equal to 0"),
        ("run.dir=3", "run.dir: Input should be a valid string; found 3"),
        ("model.dtype=float16", "model.dtype: Input should be 'float32' or 'bfloat16'"),
        ("model.latent_norm_eps=0", "model.latent_norm_eps: Input should be greater than 0"),
        ("lora.targets=attention", "lora.targets: Input should be a valid list"),
        ("lora.targets=[]", "lora.targets: List should have at least 1 item"),
        ("lora.targets=[head, 3]", "lora.targets.1: Input should be a valid string; found 3"),
        ("lora.expert_rank=0", "lora.expert_rank: Input should be greater than or equal to 1"),
        (
            "lora.expert_factors=both",
            "lora.expert_factors: Input should be 'per_expert' or 'shared'",
        ),
        ("data.pack=1", "data.pack: Input should be a valid boolean; found 1"),
        ("data.overlong=cut", "data.overlong: Input should be 'error', 'drop' or 'truncate'"),
        ("evaluate.pattern='('", "evaluate.pattern: not a regular expression: missing )"),
        (
            "evaluate.loss_every=5",
            "held-out rows are needed for evaluate.loss_every: set data.eval",
        ),
        ("mesh.expert=3", "train.micro_batch is 2; it must be a multiple of"),
    ],
)
def test_refused_values(refusal, line, message):
    found = refusal(GOOD, line)
    assert "run.yaml: 1 problem in the configuration\n" in found
    assert f"\n  - {message}" in found


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["train.keep=[stream, latents]", "train.offload=[latents]"],
            "keep and offload both name latents; required: in the device's memory",
        ),
        (
            ["train.recompute=none", "train.offload=[latents]"],
            "offload is latents and recompute is none, which keeps everything; required: recompute=layer",
        ),
        (
            ["train.recompute=none", "train.keep=[latents]"],
            "keep is latents and recompute is none, which keeps everything; required: recompute=layer",
        ),
    ],
)
def test_what_is_kept_twice_or_for_nothing(refusal, lines, message):
    assert message in refusal(GOOD, *lines)


@pytest.mark.parametrize(
    "key",
    [
        "run.dir",
        "run.seed",
        "model.checkpoint",
        "lora.rank",
        "lora.alpha",
        "lora.targets",
        "data.train",
        "train.steps",
        "train.learning_rate",
        "train.micro_batch",
        "train.accumulate",
        "train.sequence_length",
    ],
)
def test_what_a_run_must_decide_has_no_default(refusal, key):
    values = yaml.safe_load(GOOD)
    section, field = key.split(".")
    del values[section][field]
    assert refusal(yaml.safe_dump(values)).endswith(f"\n  - {key}: missing; a run must decide it")


def test_all_problems_are_in_one_message(refusal):
    text = GOOD.replace("seed: 0", "seeed: 0").replace("steps: 10", "steps: ten")
    found = refusal(text, "lora.rank=0", "mesh.expert=0")
    assert "5 problems in the configuration" in found
    for part in (
        "run.seeed: unknown",
        "run.seed: missing",
        "train.steps:",
        "lora.rank:",
        "mesh.expert:",
    ):
        assert f"\n  - {part}" in found


UNREADABLE = {
    "section twice": (GOOD + "run: {}\n", "the key 'run' stands twice"),
    "field twice": (GOOD.replace("seed: 0", "seed: 0\n  seed: 1"), "the key 'seed' stands twice"),
    "list as key": (GOOD + "? [a, b]\n: 1\n", "found unhashable key"),
    "number as key": (GOOD + "7: 1\n", "7: Keys should be strings"),
    "impossible date": (GOOD.replace("dir: out", "dir: 2024-13-45"), "month must be in 1..12"),
    "code": (
        GOOD.replace("dir: out", "dir: !!python/name:os.system"),
        "could not determine a constructor",
    ),
    "not YAML": ("a: b: c", "mapping values are not allowed here"),
    "not UTF-8": (b"a: \xff", "'utf-8' codec can't decode"),
    "empty": ("", "found NoneType, required sections: run, model, lora"),
    "list": ("- run", "found list, required sections"),
    "section that is a word": (
        GOOD.replace("run:\n  dir: out\n  seed: 0", "run: out"),
        "run: Input should be a valid dictionary",
    ),
}


@pytest.mark.parametrize(("text", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files(refusal, text, message):
    """Every one names the file, and none is a traceback of the YAML library."""
    found = refusal(text)
    assert "run.yaml: " in found
    assert message in found


def test_merge_keys_are_not_duplicates(load):
    """`<<` may stand in every section, and what is written beside it wins."""
    text = (
        GOOD.replace("evaluate", "")
        .replace("run:\n", "run: &run\n")
        .replace("train:\n  steps: 10", "train:\n  <<: {steps: 3, accumulate: 7}\n  steps: 10")
    )
    config = load(text)
    assert (config.train.steps, config.train.accumulate) == (10, 1)


def test_absent_file(tmp_path):
    with pytest.raises(MissingFileError, match=r"nowhere.yaml: no such configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_win_and_the_last_one_most(load):
    config = load(
        GOOD, "train.steps=20", "train.steps=30", "lora.targets=[head]", "data.eval=e.jsonl"
    )
    assert config.train.steps == 30
    assert config.lora.targets == ("head",)
    assert config.data.eval == "e.jsonl"


def test_override_may_open_a_section(load):
    assert load(GOOD, "evaluate.samples=3").evaluate.samples == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write it as section.field=value, like train.steps=100"),
        ("steps=3", "write it as section.field=value"),
        (".steps=3", "write it as section.field=value"),
        ("train.=3", "write it as section.field=value"),
        ("train.steps=[1", "the value is not readable as YAML"),
        ("run.dir=2024-13-45", "the value is not readable as YAML: month must be"),
    ],
)
def test_bad_overrides(refusal, override, message):
    found = refusal(GOOD, override)
    assert found.startswith(f"override {override!r}: ")
    assert message in found


def test_override_of_something_that_is_no_section(refusal):
    assert refusal("run: out", "run.dir=x") == "override 'run.dir=x': run is not a section"


def test_a_dictionary_is_not_changed_by_overrides():
    values = yaml.safe_load(GOOD.replace("1e-3", "0.001"))
    config = load_config(values, ["train.steps=99"])
    assert config.train.steps == 99
    assert values["train"]["steps"] == 10
    assert load_config(config, ["train.steps=98"]).train.steps == 98
    assert config.train.steps == 99


def test_resolved_configuration_reads_back(load):
    """What a run writes down is what it was, every default included."""
    config = load(GOOD, "train.learning_rate=1e-7", "data.eval='null'")
    text = dump_config(config)
    assert load(text) == config
    assert yaml.safe_load(text).keys() == RunConfig.model_fields.keys()
    assert "warmup_steps: 0" in text


def test_configuration_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().train.steps = 3


def test_routed_rank_and_alpha_follow_the_others(load):
    lora = load(GOOD, "lora.expert_rank=2").lora
    assert (lora.routed_rank, lora.routed_alpha) == (2, 4.0)
    assert load(GOOD, "lora.expert_rank=2", "lora.expert_alpha=3").lora.routed_alpha == 3.0
