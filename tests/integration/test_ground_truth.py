"""STD without teachers: its heads learn the data set's labels."""

import pytest
import torch

from pipelines.augment.device import TrainBatch
from std_fast.commands.export import export_run
from std_fast.config import recipe as recipes
from std_fast.method.losses import distillation_loss
from std_fast.runtime.metrics import read_jsonl
from std_fast.teachers.stream import LabelSource
from std_fast.training.train import train
from tests.small_runs import assert_same_bits, at, final_tensors, small_recipe, train_until


def test_of_a_mixed_image_the_label_with_the_larger_share():
    of = [torch.tensor(values) for values in ([1, 2, 3], [4, 5, 6], [0.9, 0.5, 0.2])]
    batch = TrainBatch(torch.zeros(3, 3, 2, 2), *of, positions=torch.arange(3), epoch=0, step=0)
    targets = LabelSource(2).targets(batch)
    assert targets.labels.tolist() == [[1, 1], [2, 2], [6, 6]]
    assert targets.confidence is None
    weighed = targets._replace(confidence=torch.zeros(3, 2))  # so that the heads weigh the same
    logits = torch.randn(3, 2, 8)
    assert torch.equal(distillation_loss(logits, targets), distillation_loss(logits, weighed))


def test_it_trains_stops_and_is_exported_without_a_teacher(image_folder, tmp_path):
    run = {"length": "2 epochs", "eval_every": "1 epoch", "save_every": "10 minutes"}
    distill = {"mode": "std", "labels": "ground_truth"}
    recipe = small_recipe(image_folder, tmp_path / "run", augment={"mix_prob": 0.5}, distill=distill, run=run)
    result = train(recipe, quiet=True)
    assert result["result"]["top1_distill"] >= 0
    last = [record for record in read_jsonl(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"][-1]
    assert "loss_distill" in last and "teacher_weight_0" not in last  # there is no teacher
    stopped = at(recipe, tmp_path / "stopped")
    train_until(stopped, 4)
    train(stopped, quiet=True, resume=True)
    assert_same_bits(final_tensors(tmp_path / "stopped"), final_tensors(tmp_path / "run"))
    assert "timm" in export_run(tmp_path / "run", tmp_path / "export", ("timm",))["differences"]


@pytest.mark.parametrize(("tokens", "taps", "columns"), [("both", None, 2), ("both", (1, 2, 3), 3), ("deit", None, 1)])
def test_one_column_of_targets_for_each_module(tokens, taps, columns):
    distill = recipes.Distill(labels="ground_truth", tokens=tokens, taps=taps)
    assert distill.num_teachers == columns
