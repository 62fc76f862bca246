"""The recipe validates itself, and every complaint names the field and the fix."""

import re
import typing
from dataclasses import KW_ONLY, is_dataclass

import pytest

from pipelines.errors import UserError
from std_fast.config import files as recipe_files
from std_fast.config import recipe as recipes
from std_fast.config.foreign import FIELD_OF, FOREIGN_NAMES
from std_fast.config.recipe import Duration, Recipe, TeacherSpec, parse_seconds, parse_warmup
from std_fast.config.schema import describe, difference, from_dict, merge, set_dotted, to_dict
from std_fast.training.schedule import unkept_settings

TRUE_LABELS = {"mode": "std", "labels": "ground_truth"}
STD = [("distill.mode", "std"), ("distill.labels", "ground_truth")]


def std(*teachers, **distill):
    return {"distill": {"mode": "std", "teachers": list(teachers)} | distill}


@pytest.mark.parametrize("name", sorted(path.stem for path in recipe_files.RECIPES.glob("*.yaml")))
def test_built_in_recipes_load_and_survive_being_saved(name):
    recipe = recipes.load(name)
    assert recipe.summary
    assert recipes.loads(recipes.dump(recipe)) == recipe


def test_no_annotation_of_a_recipe_is_one_that_python_3_10_cannot_evaluate():
    classes = [Recipe, *(type(value) for value in vars(Recipe()).values() if is_dataclass(value))]
    assert all(KW_ONLY not in typing.get_type_hints(cls).values() for cls in classes) and len(classes) == 7


@pytest.mark.parametrize("path", sorted(recipe_files.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_built_in_recipes_begin_with_their_command_and_what_came_of_it(path):
    command, *notes = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert command == f"# std-fast train {path.stem}"
    assert re.search(r"Not measured here\.$|^# Measured: benchmarks/\w+\.md", notes[-1]), notes
    for page in re.findall(r"\b(?:benchmarks|examples)/\w+\.\w+", " ".join(notes)):
        assert (recipe_files.RECIPES.parents[1] / page).is_file(), page


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"optim": {"lrr": 1}}, "optim.lrr: unknown key; did you mean 'lr'"),
        ({"optm": {}}, "optm: unknown key; did you mean 'optim'"),
        ({"optim": {"lr": "fast"}}, "optim.lr: expected float"),
        ({"optim": {"lr": True}}, "optim.lr: expected float"),
        ({"run": {"batch": 130.5}}, "run.batch: expected int"),
        ({"run": {"batch": 130}}, "run.batch: 130 must be a positive multiple of 4"),
        ({"run": {"length": "300 epoch s"}}, "run.length"),
        ({"run": {"device": "tpu"}}, "run.device: 'tpu' is not one of"),
        ({"distill": {"mode": "std"}}, "distill.teachers: is empty"),
        (std({"name": "resnet18"}, mode="none"), "distill.teachers: have no effect without distill.mode std"),
        (std({}), "distill.teachers.0: needs a name or weights"),
        (std({"name": "a"}, temperature=3), "distill.temperature: has no effect"),
        (std({"name": "a", "precision": "int8"}), "distill.teachers.0.precision: 'int8' is not one of auto, float"),
        ({"distill": {"alpha": 1.5}}, "distill.alpha: 1.5"),
        ({"distill": {"top_k": 5}}, "distill.top_k: has no effect without distill.labels: soft"),
        ({"distill": TRUE_LABELS | {"teachers": [{"name": "resnet50"}]}}, "distill.teachers: has no effect"),
        ({"distill": TRUE_LABELS | {"target_cache": "targets"}}, "distill.target_cache: has no effect"),
        ({"distill": TRUE_LABELS | {"temperature": 2.0}}, "distill.temperature: has no effect"),
        ({"distill": {"class_share": -0.5}}, "distill.class_share: -0.5 must be between 0 and 1"),
        ({"distill": {"token_mlp_ratio": [0.5, 0]}}, "distill.token_mlp_ratio: must be positive"),
        ({"distill": {"module_weights": [1, -1]}}, "distill.module_weights: must be"),
        ({"distill": {"module_weights": [1, 1], "tokens": "deit"}}, "distill.module_weights: must be"),
        ({"run": {"init_seed": -1}}, "run.init_seed: must be from 0"),
        ({"run": {"eval_batch": -1}}, "run.eval_batch: cannot be negative"),
        ({"student": {"options": {"num_classes": 3}}}, "student.options.num_classes: has its own place"),
        ({"student": {"options": {"in_chans": 1}}}, "student.options.in_chans: has its own place"),
        ({"distill": {"mine": {"every": "2 samples"}}}, "distill.mine.every"),
        ({"augment": {"flip": 2}}, "augment.flip"),
        ({"data": {"crop": {"scale": [0.5]}}}, "data.crop.scale: expected 2 values, got 1"),
        ({"data": {"crop": {"scale": "0.08,1"}}}, "data.crop.scale: expected a list, got '0.08,1'; write [0.08,1]"),
        ({"augment": {"mean": 0.5}}, "augment.mean: expected a list, got 0.5; write [0.5, 0.5, 0.5]"),
        ({"run": {"trackers": "wandb"}}, "run.trackers: expected a list, got 'wandb'; write [wandb]"),
        ({"student": {"options": "patch_size=4"}}, "got 'patch_size=4'; write {patch_size: 4}"),
        ({"data": {"crop": {"scale": [0, 2]}}}, "data.crop.scale: (0.0, 2.0) must be"),
        ({"data": {"eval_crop": {"fraction": 2}}}, "data.eval_crop.fraction: 2.0 must lie"),
        (std({"name": "a"}, {"name": "b", "std": [0, 1, 1]}), "distill.teachers.1.std: must be positive"),
        (std({"name": "a", "options": {"num_classes": 3}}), "teachers.0.options.num_classes: has its own place"),
        (std({"weights": "https://host/a.pth"}), "distill.teachers.0.weights: https://host/a.pth is a URL, which"),
        ({"student": {"weights": "s3://bucket/a.safetensors"}}, "student.weights: s3://bucket/a.safetensors is a URL"),
        ({"distill": {"target_cache": "s3://bucket/a"}}, "distill.target_cache: s3://bucket/a is a URL"),
        ({"run": {"out": "s3://bucket/a"}}, "run.out: s3://bucket/a is a URL"),
        ({"run": {"trackers": ["tensorboard", "wandb", "wandb"]}}, "run.trackers: wandb stands twice"),
        ({"student": {"name": ""}}, "student.name: is empty"),
        ({"data": {"image_size": 10000}}, "data.image_size: 10000 is too large; use 4096 pixels or less"),
        ({"data": {"hw_decoder_load": -0.1}}, "data.hw_decoder_load: -0.1"),
        ({"data": {"on_corrupt": "ignore"}}, "data.on_corrupt: 'ignore'"),
        ({"data": {"corrupt_limit": 0}}, "data.corrupt_limit: 0"),
        ({"data": 3}, "data: expected a section"),
        ({"student": {"early_size": 4}}, "student.early_size: must be 8 or more"),
        ({"student": {"early_share": 1.0}}, "student.early_share: 1.0 must be more than 0, less than 1"),
        ({"student": {"drop_path_mode": "subset"}}, "student.drop_path_mode: subset has no effect"),
        ({"optim": {"name": "sgd", "betas": [0.9, 0.95]}}, "optim.betas: betas and eps have no effect with optim.name"),
        ({"optim": {"name": "sgd", "eps": 1e-6}}, "optim.betas: betas and eps have no effect with optim.name sgd"),
        ({"optim": {"name": "muon", "nesterov": True}}, "optim.nesterov: is SGD's"),
        ({"optim": {"momentum": 0.9}}, "optim.momentum: is Muon's and SGD's"),
        ({"run": {"not_finite": "ignore"}}, "run.not_finite: 'ignore' is not one of stop, skip, rollback"),
        ({"run": {"not_finite_limit": 0}}, "run.not_finite_limit"),
        ({"run": {"rollback_every": "1 gpu-hours"}}, "run.rollback_every"),
    ],
)
def test_mistakes_are_named(overrides, complaint):
    with pytest.raises(UserError) as caught:
        from_dict(Recipe, overrides)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults_then_file_then_command_line(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: digits_std\noptim: {lr: 1e-4}\nrun: {batch: 64}\n")
    recipe = recipes.load(
        str(tmp_path / "mine.yaml"),
        [("run.batch", "32"), ("distill.teachers.0.weights", "x"), ("distill.teachers.1.name", "resnet18")],
    )
    assert recipe.optim.lr == 1e-4  # YAML itself reads 1e-4 as a string
    assert recipe.run.batch == 32
    assert recipe.optim.betas == (0.9, 0.999)  # a default
    assert recipe.student.name == "mixer"  # from the base
    assert [(t.name, t.weights) for t in recipe.distill.teachers] == [("", "x"), ("resnet18", "")]
    assert recipe.name == "mine"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a: [1", "cannot be read as YAML"),
        ("- 1", "a recipe is a mapping"),
        ("base: loop", "leads back to itself"),
        ("base: nowhere", "no such recipe"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    ],
)
def test_unusable_files(tmp_path, monkeypatch, content, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").write_text(content)
    with pytest.raises(UserError, match=complaint):
        recipes.load("loop")


def test_nearest_recipe_is_named():
    with pytest.raises(UserError, match="digits_std"):
        recipes.load("digits_sdt")


def test_overrides_into_the_wrong_place():
    for key, text, complaint in [
        ("optim.lr.x", "1", "single value"),
        ("distill.teachers.7.name", "a", "no place in a list"),
        ("optim.lr", "[", r"optim.lr: expected float, got '\['"),
        ("student.options", "[", "--student.options: cannot be read as YAML"),
        ("distill.teachers", "[{name: a}", "--distill.teachers: cannot be read as YAML"),
    ]:
        with pytest.raises(UserError, match=complaint):
            recipes.load("digits_std", [(key, text)])


@pytest.mark.parametrize(
    ("text", "steps"), [("2 epochs", 20), ("1 epoch", 10), ("7 steps", 7), ("5e2 samples", 5), ("0.25 epochs", 2)]
)
def test_durations_in_any_unit(text, steps):
    assert Duration.parse(text).steps(steps_per_epoch=10, global_batch=100) == steps


def test_what_is_more_than_nothing_is_at_least_a_step():
    assert Duration.parse("0.01 epochs").steps(10, 100) == 1
    assert Duration.parse("0 steps").steps(10, 100) == 0


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([("run.eval_every", "0.05 epochs")], "run.eval_every: 0.05 epochs is 0.5 of a step; it is done in every step"),
        ([("run.eval_every", "0.1 epochs")], None),
        ([("run.eval_every", "0 steps")], None),
        ([("optim.warmup", "5 epochs")], "optim.warmup: 5 epochs is longer than the training (2 epochs)"),
        ([("optim.warmup", "2 epochs")], None),
        ([("optim.warmup", "50 %")], None),
        ([("optim.warmup", "5 epochs"), ("run.length", "1 gpu-hours")], None),
        ([("run.rollback_every", "1 samples"), ("run.not_finite", "rollback")], "run.rollback_every: 1 samples is"),
        ([("run.rollback_every", "1 samples")], "run.rollback_every: no effect with another run.not_finite than"),
        ([("data.crop.fraction", "0.9")], "data.crop.fraction: no effect with another data.crop.kind than center"),
        ([("data.eval_crop.ratio", "[1, 2]")], "data.eval_crop.ratio: no effect with another data.eval_crop.kind"),
        ([("data.crop.fraction", "0.9"), ("data.crop.kind", "center")], "data.crop.scale: no effect with another"),
        ([("data.crop.kind", "center"), ("data.crop.scale", "[0.08, 1]")], None),
        ([("student.new_head", "true")], "student.new_head: no effect with student.weights ''"),
        ([("student.early_share", "0.8")], "student.early_share: no effect with student.early_size 0"),
        ([("optim.ema_batch", "64")], "optim.ema_batch: no effect with optim.ema 0"),
        ([("distill.taps", "[1]"), ("distill.alpha", "0.9")], "distill.taps, distill.alpha: no effect with distill"),
        (
            [("student.drop_path_mode", "subset"), ("student.drop_path", "0.0156")],
            "student.drop_path_mode: no effect with student.drop_path of 1/64 or less",
        ),
        ([("distill.views", "2")], None),  # the images are those of two epochs without distillation too
        ([("augment.randaugment_mstd", "1")], "augment.randaugment_mstd: no effect with augment.randaugment_n 0"),
        ([("augment.switch", "0.2"), ("augment.cutmix", "0")], "augment.switch: no effect with augment.mixup 0 or"),
        ([("augment.cutmix", "0.5"), ("augment.mix_prob", "0")], "augment.cutmix: no effect with augment.mix_prob 0"),
        ([("data.hw_decoder_load", "0.5")], "data.hw_decoder_load: no effect with another data.backend than dali"),
        ([("optim.lr", "1e-6")], "optim.min_lr: 1e-05 is above the peak learning rate 1e-06 of a batch of 64"),
        ([*STD, ("optim.smoothing", "0")], None),
        ([*STD, ("distill.reweight", "false")], "distill.reweight: no effect with fewer than two teachers"),
        ([*STD, ("distill.tokens", "spatial"), ("distill.mine.weight", "0")], None),
        ([*STD, ("distill.tokens", "spatial"), ("distill.mine.weight", "1")], "distill.mine.weight: no effect with"),
        ([*STD, ("distill.mine.ema", "0.1"), ("distill.mine.weight", "0")], "distill.mine.ema: no effect with distill"),
        ([*STD, ("distill.tokens", "none"), ("distill.token_mlp_ratio", "[1, 1]")], "distill.token_mlp_ratio: no eff"),
        ([*STD, ("distill.alpha", "1"), ("distill.predict", "distill"), ("optim.smoothing", "0")], "optim.smoothing: "),
        ([*STD, ("distill.alpha", "1")], "distill.predict: mean counts the class head, which learns nothing with"),
        ([*STD, ("distill.alpha", "1"), ("distill.class_share", "0.5")], None),
        ([*STD, ("distill.alpha", "0")], "distill.predict: mean counts distillation heads that learn nothing with"),
        ([*STD, ("distill.class_share", "1")], "distill.predict: mean counts distillation heads that learn nothing"),
        ([*STD, ("distill.module_weights", "[0, 1]")], "learn nothing with a 0 in distill.module_weights"),
        ([*STD, ("distill.module_weights", "[0, 1]"), ("distill.predict", "class")], None),
    ],
)
def test_settings_that_a_run_does_not_keep_to(overrides, line):
    plain = [("run.length", "2 epochs"), ("optim.warmup", "1 steps"), ("run.eval_every", "1 epochs")]
    recipe = recipes.load("digits_mixer", [*plain, *overrides])
    lines = unkept_settings(recipe, 10)
    assert [] == lines if line is None else len(lines) == 1 and line in lines[0]


def test_other_times():
    assert parse_seconds("1.5 minutes", "x") == 90
    assert parse_warmup("5 %") == 0.05
    assert parse_warmup("5 epochs") == Duration(5, "epochs")
    for bad in ("x %", "100 %", "3 gpu-hours"):
        with pytest.raises(UserError, match="optim.warmup"):
            parse_warmup(bad)
    with pytest.raises(UserError, match="run.save_every"):
        parse_seconds("10", "run.save_every")
    with pytest.raises(UserError, match="run.timeout: '' is no time"):
        parse_seconds("", "run.timeout")


def test_difference_names_fields():
    one = recipes.load("digits_std")
    two = recipes.load("digits_std", [("optim.lr", "3"), ("augment.flip", "0.25")])
    assert difference(one, two) == ["augment.flip", "optim.lr"]
    assert to_dict(one)["optim"]["betas"] == [0.9, 0.999]
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_every_field_has_a_text():
    rows = describe(Recipe)
    assert {"data.train", "data.crop.scale", "augment.mean", "distill.mine.every", "distill.teachers.N.name"} <= {
        name for name, _, _ in rows
    }
    assert not [name for name, _, text in rows if not text.strip()]


def test_every_default_of_the_help_is_the_true_one_as_one_types_it():
    rows = {name: default for name, default, _ in describe(Recipe)}
    assert (rows["distill.mode"], rows["data.eval_crop.kind"], rows["run.out"]) == ("none", "center", "runs/{name}")
    for name, default in rows.items():
        data: dict = {}
        dotted = name.replace(".N.", ".0.")
        set_dotted(data, dotted, "" if default == "''" else default)
        if dotted == name:
            assert from_dict(Recipe, data) == Recipe(), name
        else:
            assert from_dict(TeacherSpec, data["distill"]["teachers"][0]) == TeacherSpec(), name


# Words as they are typed


@pytest.mark.parametrize("word", ["runs #2", "0123", "12:30:00", "true", "null", "[a", "b: c", "1e3", "", " a ", "'q'"])
def test_a_text_field_takes_the_word_as_typed(word):
    recipe = recipes.load("digits_mixer", [("run.out", word), ("data.val", word)])
    assert (recipe.run.out, recipe.data.val) == (word, word)
    assert type(recipe.run.out) is str
    assert recipes.loads(recipes.dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("written", "out"),
    [("0123", "0123"), ("12:30:00", "12:30:00"), ("2026-13-01", "2026-13-01"), ("1e3", "1e3"), ("yes", "yes"),
     ("'0123'", "0123"), ("runs #2", "runs")],
)  # fmt: skip
def test_an_unquoted_word_in_a_file_is_text_where_text_is_due(tmp_path, written, out):
    (tmp_path / "mine.yaml").write_text(f"run:\n  out: {written}\n")
    recipe = recipes.load(str(tmp_path / "mine.yaml"))
    assert recipe.run.out == out
    assert recipes.loads(recipes.dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("run.overlap", "on", "on"),
        ("run.overlap", "off", "off"),
        ("run.overlap", "yes", "on"),
        ("run.overlap", "No", "off"),
        ("run.overlap", "auto", "auto"),
        ("run.compile", "off", "off"),
        ("distill.mode", "none", "none"),
        ("distill.mode", "null", "none"),
        ("distill.reweight", "off", False),
        ("distill.reweight", "yes", True),
        ("run.seed", "0123", 123),
        ("run.seed", "9223372036854775807", 9223372036854775807),
        ("run.batch", "5.12e2", 512),
        ("optim.lr", "1e-3", 0.001),
        ("data.hw_decoder_load", "null", None),
        ("data.hw_decoder_load", "0.5", 0.5),
        ("student.options", "{patch_size: 4, act: no, size: 0x10}", {"patch_size": 4, "act": False, "size": 16}),
        ("student.options", "{a: 010, b: 1e3, c: 1_000, d: 0o17}", {"a": 10, "b": 1000.0, "c": 1000, "d": 15}),
        ("student.options", "{a: 12:30:00, b: 2020-01-01}", {"a": "12:30:00", "b": "2020-01-01"}),
        ("student.options", "{a: '010', b: '1e3', c: '0o7'}", {"a": "010", "b": "1e3", "c": "0o7"}),
        ("optim.betas", "[0.9, 1e-1]", (0.9, 0.1)),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_other_fields_read_the_word_by_their_type(tmp_path, key, word, value, in_file):
    section, field = key.split(".")
    path = tmp_path / "mine.yaml"
    path.write_text(f"{section}: {{{field}: {word}}}\n" if in_file else "{}")
    recipe = recipes.load(str(path), [] if in_file else [(key, word)])
    got = getattr(getattr(recipe, section), field)
    assert got == value and type(got) is type(value)
    assert recipes.loads(recipes.dump(recipe)) == recipe


def test_a_section_keeps_its_own_defaults_when_one_of_its_fields_is_set():
    recipe = recipes.load("imagenet", [("data.eval_crop.fraction", "0.9"), ("distill.predict", "class")])
    assert (recipe.data.eval_crop.kind, recipe.data.eval_crop.fraction) == ("center", 0.9)
    assert recipe.distill.mode == "none"


@pytest.mark.parametrize("word", ["12:30", "0x10", "1,000", "nan", "inf", "true", "null", ""])
def test_a_number_is_no_time_and_no_truth_value(word):
    with pytest.raises(UserError, match=f"run.seed: expected int, got '{word}'"):
        recipes.load("digits_mixer", [("run.seed", word)])


def test_words_within_lists_and_options():
    recipe = recipes.load(
        "digits_std",
        [
            ("distill.teachers", "[{weights: 0123}, {name: resnet18}]"),
            ("distill.teachers.1.options", "{small_stem: yes}"),
            ("distill.teachers.1.options.width", "8"),
            ("student.options.patch_size", "2"),
        ],
    )
    assert [(t.weights, t.options) for t in recipe.distill.teachers] == [
        ("0123", {}),
        ("", {"small_stem": True, "width": 8}),
    ]
    assert recipe.student.options["patch_size"] == 2


def test_a_recipe_of_an_earlier_version_with_teachers_needs_no_mode(tmp_path):
    (tmp_path / "old.yaml").write_text("distill: {teachers: [{name: resnet18}]}\nrun: {compress_gradients: false}\n")
    assert recipes.load(str(tmp_path / "old.yaml")).distill.mode == "std"


# Names of neighbours


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("batch_size", "batch_size: unknown key; here it is run.batch (images per step over all GPUs)"),
        ("run.epochs", "run.epochs: unknown key; here it is run.length"),
        ("budget.foo", "budget.foo: unknown key; here it is run.length ("),
        ("workers", "here it is data.threads"),
        ("training.label_smoothing", "here it is optim.smoothing"),
        ("lr", "here it is optim.lr (peak learning rate"),
        ("run.lr", "here it is optim.lr"),
        ("distill.drop_path", "here it is student.drop_path"),
        ("optim.weights", "did you mean student.weights or distill.teachers.N.weights?"),
        ("optim.lrr", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("repeated_aug", "here it is data.aug_repeats"),
        ("log_wandb", "here it is run.trackers"),
        ("resolution.min_res", "here it is student.early_size"),
        ("data.in_memory", "here it is data.backend"),
        ("three_augment", "here it is augment.policy"),
        ("run.accumulate", "run.accumulate: unknown key; here it is run.micro_batch ("),
        ("run.frobnicate", "run.frobnicate: unknown key (known: "),
    ],
)
def test_a_neighbours_name_leads_to_ours(key, complaint):
    with pytest.raises(UserError) as caught:
        recipes.load("digits_mixer", [(key, "1")])
    assert complaint in str(caught.value)


def test_neighbours_names_lead_to_fields_and_are_none_themselves():
    fields = {name for name, _, _ in describe(Recipe)}
    assert set(FOREIGN_NAMES) <= fields
    own = {name.rpartition(".")[2] for name in fields}
    assert not own & (FIELD_OF.keys() - {"lr", "scale", "ratio"})  # these are in two sections, and one is meant
    assert len(FIELD_OF) == sum(len(names.split()) for names in FOREIGN_NAMES.values())
