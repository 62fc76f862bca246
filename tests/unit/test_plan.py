"""What a budget buys, from a measurement whose result is known; and the measurement itself on a tiny run."""

import copy
import json
from dataclasses import asdict, replace
from datetime import datetime

import pytest
import timm
from safetensors.torch import save_file

from pipelines.errors import UserError
from std_fast import cli
from std_fast.commands import measure, plan
from std_fast.config import recipe as recipes
from std_fast.config.recipe import Recipe
from std_fast.config.schema import from_dict

PLAIN = {
    "student": {"name": "mixer", "options": {"patch_size": 4, "dim": 8, "depth": 3}},
    "data": {"image_size": 16, "threads": 1},
    "run": {"batch": 8, "length": "1 gpu-hours", "eval_every": "5 epochs", "device": "cpu"},
}
STD = {**PLAIN, "distill": {"mode": "std", "teachers": [{"name": "test_resnet"}, {"name": "test_vit"}]}}


def recipe_of(data=STD, **run):
    return from_dict(Recipe, {**data, "run": {**data["run"], **run}})


def mode(rate, **more):
    return {
        "images_per_second": rate,
        "steps": 50,
        "waiting_share": 0.0,
        "compile_seconds": 0.0,
        "memory_gib": 3.5,
        **more,
    }


MEASURED = {
    "format": 1, "date": "2026-01-01T00:00:00+00:00", "device": "GPU", "versions": {},
    "samples": 1_000_003, "steps_per_epoch": 125_000, "val_images": 50_000, "evaluation_seconds": 10.0,
    "start_seconds": 40.0, "save_seconds": {"stall": 0.5, "write": 1.5}, "checkpoint_bytes": 10**8,
    "host_memory_gib": 4.0, "gpus": 1,
    "modes": {"running": mode(10_000.0, compile_seconds=20.0), "stored": mode(20_000.0), "none": mode(25_000.0)},
}  # fmt: skip


@pytest.fixture
def measured():
    return {**copy.deepcopy(MEASURED), "recipe": recipes.dump(recipe_of())}


def test_epochs_of_each_mode(measured):
    bought = plan.buy(measured, recipe_of(length="8 gpu-hours"), datetime(2026, 1, 1, 12).astimezone())
    rows = {row.mode: row for row in bought.rows}
    reserve = 1.25 * 12 + plan.CLOSING
    assert bought.reserve_seconds == pytest.approx(reserve, abs=0.1)
    # an epoch of a million images takes 100 s and a fifth of an evaluation; start, compilation and one evaluation first
    left = 8 * 3600 - 40 - 10 - reserve
    assert rows["running"].epochs == pytest.approx((left - 20) / 102, rel=1e-3)
    assert rows["stored"].epochs == pytest.approx(left / 52, rel=1e-3)
    assert rows["none"].epochs == pytest.approx(left / 42, rel=1e-3)
    assert rows["running"].steps == pytest.approx(rows["running"].epochs * 125_000, rel=1e-3)
    views = round(rows["running"].epochs / 2)
    assert rows["views"].epochs == pytest.approx(views + (left - 20 - 102 * views) / 52, rel=1e-3)
    # 4 bytes per image, epoch and teacher
    assert rows["views"].targets_bytes == pytest.approx(4 * 1_000_003 * 2 * views, rel=1e-4)
    assert rows["stored"].targets_bytes == pytest.approx(4 * 1_000_003 * 2 * -(-rows["stored"].epochs // 1), rel=1e-4)
    assert rows["running"].targets_bytes == rows["none"].targets_bytes == 0
    assert bought.ends.startswith("2026-01-01T20:00")
    assert list(bought.options) == ["--distill.target-cache", "targets/run", "--distill.views", str(views)]
    text = plan.as_text(bought)
    for part in (
        "8 GPU-hours on GPU",
        "teachers running",
        f"{views} views cycled",
        "3.5 GiB",
        "20:00",
        "--distill.views",
    ):
        assert part in text
    assert json.loads(json.dumps(asdict(bought)))["rows"][0]["mode"] == "running"


def test_without_a_budget_the_length_is_priced(measured):
    cost = {row.mode: row.gpu_hours for row in plan.buy(measured, recipe_of(length="300 epochs")).rows}
    assert cost["running"] == pytest.approx((300 * 102 + 60 + 15 + plan.CLOSING) / 3600, rel=1e-3)
    assert cost["none"] < cost["stored"] < cost["views"] < cost["running"]
    budget = plan.buy(measured, recipe_of(length=f"{cost['stored'] + 10 / 3600} gpu-hours"))
    assert {row.mode: row.epochs for row in budget.rows}["stored"] == pytest.approx(300, rel=1e-3)  # the way back


def test_eight_gpus_take_an_eighth_of_the_time(measured):
    """Eight of an eighth of the speed: one GPU's epochs for eight times its GPU-hours, which end at the same time."""
    now = datetime(2026, 1, 1, 12).astimezone()
    one = plan.buy(measured, recipe_of(length="8 gpu-hours"), now)
    eight = copy.deepcopy(measured) | {"gpus": 8, "evaluation_seconds": 80.0}
    for way in eight["modes"].values():
        way["images_per_second"] /= 8
    many = plan.buy(eight, recipe_of(length="64 gpu-hours"), now)
    assert [row.epochs for row in many.rows] == [row.epochs for row in one.rows]
    assert many.ends == one.ends and many.options == one.options and many.rows[0].gpu_hours == 64
    assert "8 are assumed to be 8 times as fast" in many.notes[-1]
    assert "64 GPU-hours on 8 x GPU" in plan.as_text(many) and "on 8 GPUs it ends at" in plan.as_text(many)
    cpu = plan.as_text(plan.buy(measured | {"device": "cpu, 2 threads"}, recipe_of(length="300 epochs"), now))
    assert "GPU" not in cpu and "recommended: store the targets" in cpu and "\nstarted now it ends at 2026-" in cpu
    priced = [plan.buy(m, recipe_of(length="300 epochs"), now) for m in (measured, eight)]
    assert priced[1].rows[0].gpu_hours == pytest.approx(8 * priced[0].rows[0].gpu_hours, rel=1e-4)
    assert priced[1].ends == priced[0].ends


def test_the_share_of_one_process():
    share = measure.share_of(recipe_of(batch=64), 8, 8)
    assert share.run.batch == 8 and share.data.threads == 1
    assert measure.share_of(recipe_of(batch=6 * 4), 1, 1) == recipe_of(batch=6 * 4)
    with pytest.raises(UserError, match="run.batch: 8 over 8 GPUs must be a multiple of 32"):
        measure.measure(recipe_of(), 1.0, 8)
    with pytest.raises(UserError, match="--gpus: must be 1 or more"):
        measure.measure(recipe_of(), 1.0, -1)


def test_what_is_recommended(measured):
    for rate, cost in ((10_500.0, "5 %"), (7_000.0, "0 %")):
        measured["modes"]["stored"]["images_per_second"] = rate
        bought = plan.buy(measured, recipe_of(length="8 gpu-hours"))
        assert bought.options == () and f"they cost {cost}" in bought.recommended
    measured["modes"]["stored"]["images_per_second"] = 20_000.0
    few = plan.buy(measured, recipe_of(length="0.2 gpu-hours"))  # no epoch would come a second time
    assert "views" not in {row.mode for row in few.rows}
    assert few.options[:2] == ("--distill.target-cache", "targets/run") and "few" in few.notes[0]
    short = plan.buy(measured, recipe_of(length="8 gpu-hours", eval_every="1 epoch"))
    assert short.options[-2:] == ("--run.eval-every", "4 epochs")  # 10 s after each 100 s
    measured["modes"]["running"] |= {"waiting_share": 0.4, "steps": 2, "images_per_second": 0.5}
    slow = plan.buy(measured, recipe_of(length="8 gpu-hours"))
    assert "40 % of the time is waiting" in " ".join(slow.notes)
    # 5 steps of 16 s in an eighth of the time
    few = "nothing: measured 2 steps only, and a recommendation takes 5; give --seconds 640"
    assert (slow.recommended, slow.options) == (few, ())
    measured["modes"] = {"none": mode(100.0)}
    assert plan.buy(measured, recipe_of(PLAIN)).recommended.startswith("a plain training")


def test_a_budget_smaller_than_its_start(measured):
    made = plan.buy(measured, recipe_of(length="0.01 gpu-hours"), now=datetime(2026, 1, 1))
    assert [row.epochs for row in made.rows] == [0, 0, 0]
    takes = made.start_seconds + made.reserve_seconds
    assert takes > 36 and made.rows[0].gpu_hours == pytest.approx(takes / 3600, abs=1e-3)
    assert made.notes[0].endswith("it would be exceeded")


def test_a_stored_measurement_is_of_the_same_work(measured, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(measured))
    data = STD["data"] | {"train": "1.beton", "one_part": True}
    same = recipe_of(STD | {"data": data}, length="8 gpu-hours", seed=3, log_every=7)
    with pytest.raises(UserError, match=r"bench.json: was measured for 1 GPU\(s\); leave --gpus out"):
        plan.read(path, same, 2)
    now = "2026-01-01T00:00"
    assert replace(plan.plan(same, stored=str(path)), ends=now) == replace(plan.buy(measured, same), ends=now)
    old = {key: value for key, value in measured.items() if key != "gpus"}
    path.write_text(json.dumps(old))
    assert plan.plan(same, stored=str(path)).gpus == 1  # as version 0.1.0 stored it
    for other, name in [
        (recipe_of(batch=16), "run.batch"),
        (recipe_of({**STD, "data": {"image_size": 32}}), "data.image_size"),
        (recipe_of(PLAIN), "distill.mode"),
        (recipe_of({**STD, "distill": {"mode": "std", "teachers": [{"name": "test_resnet"}]}}), "distill.teachers"),
    ]:
        with pytest.raises(UserError, match=f"bench.json: was measured with another {name}"):
            plan.read(path, other)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no measurement"),
        ("[]", "no measurement"),
        ("{}", "no measurement"),
        (None, "is damaged or was made by another version"),
    ],
)
def test_a_damaged_measurement(measured, tmp_path, text, complaint):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**measured, "samples": -1}) if text is None else text)
    with pytest.raises(UserError, match=complaint):
        plan.read(path, recipe_of())


def write_tiny(folder, images):
    """A recipe with a teacher, on the CPU, in a file; its path."""
    recipe, weights = folder / "tiny.yaml", folder / "teacher.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), weights)
    data = {"train": str(images), "val": str(images), "image_size": 16, "threads": 1}
    data = {
        **STD,
        "data": data,
        "distill": {"mode": "std", "teachers": [{"name": "test_resnet", "weights": str(weights)}]},
    }
    data["run"] = {**STD["run"], "out": str(folder / "runs" / "tiny")}
    recipe.write_text(recipes.dump(from_dict(Recipe, data)))
    return recipe


def test_a_slow_recipe_takes_one_batch_and_one_step(image_folder, tmp_path, capsys, caplog):
    """Where no step fits into the time, more would only take longer: it ends, and recommends nothing."""
    recipe, saved = write_tiny(tmp_path, image_folder), tmp_path / "bench.json"
    command = ["plan", str(recipe), "--budget.gpu-hours", "0.5", "--json", "--seconds", "0.0001", "--save", str(saved)]
    assert cli.main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["recommended"].startswith("nothing: measured 1 step only") and made["options"] == []
    assert {name: mode["steps"] for name, mode in json.loads(saved.read_text())["modes"].items()} == {"running": 1}
    assert "measuring takes about" in caplog.text


def test_the_command_measures_the_real_loop(image_folder, tmp_path, capsys, monkeypatch):
    timed = measure.time_evaluation  # of a large data set a part, so that it takes less than it says
    monkeypatch.setattr(measure, "time_evaluation", lambda run, seconds: 60.0 + timed(run, seconds))
    monkeypatch.setattr(measure, "LEAST_STEPS", 1)  # all ways, on a busy machine too
    recipe = write_tiny(tmp_path, image_folder)
    saved = tmp_path / "bench.json"
    command = ["plan", str(recipe), "--budget.gpu-hours", "0.5", "--json"]
    assert cli.main([*command, "--seconds", "0.6", "--save", str(saved), "--gpus", "2"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {row["mode"] for row in made["rows"]} == {"running", "views", "stored", "none"}
    assert all(row["images_per_second"] > 0 and row["epochs"] > 0 for row in made["rows"])
    measured = json.loads(saved.read_text())
    assert measured["samples"] == measured["val_images"] == 24 and measured["steps_per_epoch"] == 3
    assert made["gpus"] == measured["gpus"] == 2
    rate = measured["modes"]["running"]["images_per_second"]
    assert made["rows"][0]["images_per_second"] == pytest.approx(2 * rate, abs=0.1)
    assert measured["checkpoint_bytes"] > 1000 and measured["evaluation_seconds"] > 60 and measured["start_seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bench.json",
        "teacher.safetensors",
        "tiny.yaml",
    ]  # nothing else is left
    assert cli.main(["plan", str(recipe), "--seconds", "0"]) == 2
    assert "--seconds" in capsys.readouterr().err
    # elsewhere, without the data
    recipe.write_text(recipe.read_text().replace(str(image_folder), "/nowhere"))
    assert cli.main([*command, "--from", str(saved)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == made["rows"]
