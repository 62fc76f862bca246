"""`std-fast doctor`: real probes on this machine, and packages made missing or broken for the import system itself."""

import json
import sys

import pytest

from std_fast.commands import doctor, doctor_probes


@pytest.fixture(scope="module")
def here():
    return {check.name: check for check in doctor.checks()}


def by_name(name):
    return next(check for check in doctor.checks() if check.name == name)


def forget(monkeypatch, package):
    """Makes the next import of `package` start from the file system."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


def test_this_machine_is_in_order(here):
    assert doctor.exit_code(list(here.values())) == 0, [c for c in here.values() if c.required and not c.ok]
    packages = {*"python torch torchvision timm numpy ffcv DALI apex triton tensorboard onnx".split()}
    built_with = {"C++ compiler", "pkg-config", "OpenCV headers", "turbojpeg headers"}
    assert packages | built_with | {"CUDA device"} <= here.keys()
    for name in ("CPU cores", "memory", "/dev/shm", "disk"):
        assert here[name].version
    import torch

    assert here["torch"].version == torch.__version__.split("+")[0]
    assert here["CUDA device"].ok == torch.cuda.is_available()


def test_every_finding_comes_with_its_fix(here):
    for check in here.values():
        assert check.ok or check.fix or check.name == "CUDA device", check


def test_a_missing_required_package_is_shown_and_fails(monkeypatch):
    forget(monkeypatch, "tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # how Python itself marks a module that cannot be imported
    monkeypatch.setattr(doctor_probes, "_version", lambda name: "")
    check = by_name("tensorboard")
    assert not check.ok and check.status == "MISSING" and check.detail == "not installed"
    assert check.fix["conda"].endswith("tensorboard") and check.fix["pip"].endswith("tensorboard")
    assert doctor.exit_code([check]) == 1


def test_a_broken_optional_package_is_shown_with_its_reason(monkeypatch, tmp_path):
    (tmp_path / "ffcv").mkdir()
    reason = "libopencv_core.so.406: cannot open shared object file"
    (tmp_path / "ffcv" / "__init__.py").write_text(f"raise OSError('{reason}')")
    (tmp_path / "ffcv-1.0.2.dist-info").mkdir()
    (tmp_path / "ffcv-1.0.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: ffcv\nVersion: 1.0.2\n")
    forget(monkeypatch, "ffcv")
    monkeypatch.syspath_prepend(tmp_path)
    check = by_name("ffcv")
    assert not check.ok and check.status == "optional" and reason in check.detail and check.version == "1.0.2"
    assert "libopencv-dev libturbojpeg0-dev" in check.fix["debian"]
    assert "libjpeg-turbo" in check.fix["conda"]
    assert "--force-reinstall" in check.fix["pip"] and check.fix["pip"].endswith("ffcv")
    assert doctor.exit_code([check]) == 0


def test_the_wrong_apex_is_distinguished_from_the_right_one(monkeypatch, tmp_path):
    forget(monkeypatch, "apex")
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    wrong = by_name("apex")
    assert not wrong.ok and "another project" in wrong.detail
    assert "pip uninstall -y apex" in wrong.fix["note"] and "nvidia-apex" in wrong.fix["conda"]

    (package / "optimizers").mkdir()
    (package / "optimizers" / "__init__.py").write_text("")
    monkeypatch.setitem(sys.modules, "amp_C", None)
    without_kernels = by_name("apex")
    assert not without_kernels.ok and "without its CUDA kernels" in without_kernels.detail


def test_a_probe_that_fails_does_not_end_the_report(monkeypatch):
    monkeypatch.setattr(
        doctor_probes.shutil, "disk_usage", lambda path: (_ for _ in ()).throw(PermissionError("not yours"))
    )
    disk = by_name("disk")
    assert not disk.ok and "PermissionError: not yours" in disk.detail


def test_report_prints_each_check_and_a_fix_that_can_be_copied(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    command = "sudo apt-get install -y " + " ".join(f"package{i}" for i in range(12))
    fine = doctor.Check("torch", True, "2.11.0", "built for [CUDA] 13.0", required=True)
    bad = doctor.Check("ffcv", False, "", "not installed", {"debian": command})
    assert doctor.report([fine, bad]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "[CUDA]" in out and "optional" in out
    assert command in out, "a folded command cannot be copied"
    assert doctor.report([doctor.Check("torch", False, required=True)]) == 1
    assert "MISSING" in capsys.readouterr().out


def test_report_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.report([doctor.Check("rich", False, required=True)]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_json_is_one_document(capsys, here):
    document = json.loads(doctor.as_json(list(here.values())))
    assert document["ok"] is True
    rows = {row["name"]: row for row in document["checks"]}
    assert set(rows) == set(here)
    assert set(rows["torch"]) == {"name", "status", "ok", "required", "version", "detail", "fix"}
    assert doctor.main(json_document=True) == 0
    out, err = capsys.readouterr()
    assert err.startswith("std-fast doctor: importing torch")  # it is silent for seconds otherwise
    printed = json.loads(out)
    assert [row["name"] for row in printed["checks"]] == [row["name"] for row in document["checks"]]
