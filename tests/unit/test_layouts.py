"""Layouts that could mean several things: understood where that is certain, else refused by name of the option."""

import json
import logging
from pathlib import Path

import pytest

from pipelines.convert.job import ConvertSettings, convert
from pipelines.convert.listing import Listing
from pipelines.convert.sources import list_source
from pipelines.convert.splits import split_of
from pipelines.errors import DataError, UserError
from pipelines.read.folder import FolderSource
from tests.archives import tar_bytes, write_parquet
from tests.beton_tools import encoded, pixels

IMAGE = encoded(pixels(8, 9))


def tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(tar_bytes(files))


def folder(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(IMAGE)
    return root


def listed(src: str | Path, tmp_path: Path, **options: object) -> Listing:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return list_source(str(src), ConvertSettings(seed=None, **options), str(work))


def classes_of(listing: Listing) -> dict[str, str]:
    return {name: listing.classes[label] for name, label in zip(listing.names, listing.labels, strict=True)}


# tars


def test_dotted_names_in_class_tars(tmp_path: Path) -> None:
    for name in "ab":
        tar(tmp_path / "src" / f"{name}.tar", {f"./2021.05.0{i}.png": IMAGE for i in range(3)} | {"4.5": IMAGE})
    listing = listed(tmp_path / "src", tmp_path)
    assert len(listing) == 8 and not listing.faults and not listing.ignored
    assert listing.labels.tolist() == [0] * 4 + [1] * 4 and listing.classes == ["a", "b"]


def test_dotted_names_in_shards(tmp_path: Path) -> None:
    """KEY ends at the first dot, as in WebDataset, unless the .cls files have more dots."""
    tar(tmp_path / "a.tar", {"1.jpg": IMAGE, "1.seg.png": IMAGE, "1.cls": b"0"})
    listing = listed(tmp_path / "a.tar", tmp_path)
    assert (
        listing.names == ["a.tar/1.jpg"] and listing.ignored == ["a.tar/1.seg.png"] and listing.labels.tolist() == [0]
    )
    tar(tmp_path / "b.tar", {"2021.05.png": IMAGE, "2021.05.cls": b"1", "2021.06.png": IMAGE, "2021.06.cls": b"0"})
    listing = listed(tmp_path / "b.tar", tmp_path)
    assert listing.labels.tolist() == [1, 0] and not listing.faults
    tar(tmp_path / "c.tar", {"1.jpg": IMAGE, "1.cls": b"0", "2021.05.png": IMAGE})
    assert listed(tmp_path / "c.tar", tmp_path).faults == [
        ("c.tar/2021.05.png", "is field '05.png' of key '2021', not image '2021.05': leave one dot in its name")
    ]


@pytest.mark.parametrize("name", ["golden.retriever.tar", "golden retriever.tar"])
def test_names_of_inner_tars(name: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner.tar"
    tar(inner, {"1.jpg": IMAGE})
    tar(tmp_path / "train.tar", {name: inner.read_bytes()})
    assert listed(tmp_path / "train.tar", tmp_path).classes == [name[:-4]]


def test_shards_of_class_folders(tmp_path: Path) -> None:
    for shard in range(2):
        files = {f"{name}/{shard}{i}.png": IMAGE for name in "abc" for i in range(2)}
        tar(tmp_path / "src" / f"shard-{shard}.tar", files)
    listing = listed(tmp_path / "src", tmp_path)
    assert listing.classes == ["a", "b", "c"] and listing.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert listed(tmp_path / "src", tmp_path, label_from="tar").classes == ["shard-0", "shard-1"]


@pytest.mark.parametrize(("values", "classes"), [(("b", "a"), ["a", "b"]), ((0, 10), [str(i) for i in range(11)])])
def test_shards_with_json(values: tuple, classes: list[str], tmp_path: Path) -> None:
    for shard in range(2):
        files = {f"{shard}{i}.jpg": IMAGE for i in range(2)}
        files |= {f"{shard}{i}.json": json.dumps({"label": values[i], "w": 0}).encode() for i in range(2)}
        tar(tmp_path / "src" / f"shard-{shard}.tar", files)
    listing = listed(tmp_path / "src", tmp_path)
    assert list(classes_of(listing).values()) == [str(value) for value in values] * 2
    assert listing.classes == classes
    assert listed(tmp_path / "src", tmp_path, label_key="w").labels.tolist() == [0] * 4


def test_json_with_two_labels(tmp_path: Path) -> None:
    files = {"1.jpg": IMAGE, "1.json": b'{"label": 0, "class_name": "cat"}'}
    tar(tmp_path / "a.tar", files)
    for label_from in ("auto", "json"):
        with pytest.raises(UserError, match=r"a.tar/1: its .json holds label and class_name; choose with --label-key"):
            listed(tmp_path / "a.tar", tmp_path, label_from=label_from)
    assert listed(tmp_path / "a.tar", tmp_path, label_key="class_name").classes == ["cat"]
    tar(tmp_path / "b.tar", files | {"1.cls": b"0"})
    assert listed(tmp_path / "b.tar", tmp_path).labels.tolist() == [0]


def test_numbers_that_begin_at_one(tmp_path: Path) -> None:
    """Wherever they are: class 0 would be empty, and each class one too far."""
    tar(tmp_path / "a.tar", {"1.jpg": IMAGE, "1.cls": b"1", "2.jpg": IMAGE, "2.cls": b"2"})
    tar(tmp_path / "b.tar", {"1.jpg": IMAGE, "1.json": b'{"label": 1}', "2.jpg": IMAGE, "2.json": b'{"label": 2}'})
    (tmp_path / "classes").write_text("none\nant\nbee\n")
    for src in (tmp_path / "a.tar", tmp_path / "b.tar", parquet(tmp_path / "c.parquet", [1, 2])):
        with pytest.raises(
            UserError,
            match=f"{src}: numbers begin at 1; .* convert all parts together; .* or give --classes",
        ):
            listed(src, tmp_path)
        assert listed(src, tmp_path, classes=str(tmp_path / "classes")).labels.tolist() == [1, 2]
    assert listed(parquet(tmp_path / "d.parquet", [1], names=["ant", "bee"]), tmp_path).labels.tolist() == [1]


def test_cls_and_json_that_contradict(tmp_path: Path) -> None:
    files = {f"{i}.{ending}": data for i in range(2) for ending, data in (("jpg", IMAGE), ("cls", b"%d" % i))}
    tar(tmp_path / "a.tar", files | {"0.json": b'{"label": 0.0}', "1.json": b'{"label": 0}'})
    with pytest.raises(UserError, match=r"^a.tar/1: its .cls holds label 1 and its .json 0; choose with --label-from"):
        listed(tmp_path / "a.tar", tmp_path)
    assert listed(tmp_path / "a.tar", tmp_path, label_from="cls").labels.tolist() == [0, 1]
    assert listed(tmp_path / "a.tar", tmp_path, label_from="json").labels.tolist() == [0, 0]
    tar(tmp_path / "b.tar", files | {"0.json": b'{"label": 0}', "1.json": b'{"label": "cat"}'})
    assert listed(tmp_path / "b.tar", tmp_path).labels.tolist() == [0, 1]


def test_names_in_cls(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"1.jpg": IMAGE, "1.cls": b"wire fox\n", "2.jpg": IMAGE, "2.cls": b"ant"})
    assert classes_of(listed(tmp_path / "a.tar", tmp_path)) == {"a.tar/1.jpg": "wire fox", "a.tar/2.jpg": "ant"}


def test_a_label_of_several_lines_is_a_fault(tmp_path: Path) -> None:
    files = {"1.jpg": IMAGE, "1.cls": b"3\n4\n", "2.jpg": IMAGE, "2.cls": b"ant\nbee", "3.jpg": IMAGE, "3.cls": b"0"}
    tar(tmp_path / "a.tar", files)
    listing = listed(tmp_path / "a.tar", tmp_path)
    assert listing.names == ["a.tar/3.jpg"] and listing.labels.tolist() == [0]
    assert listing.faults == [(f"a.tar/{i}.jpg", "its .cls holds several lines, not one label") for i in (1, 2)]


def test_tars_that_may_be_classes_or_shards(tmp_path: Path) -> None:
    for name in ("train-00", "train-01"):
        tar(tmp_path / "src" / f"{name}.tar", {"1.jpg": IMAGE})
    with pytest.raises(UserError, match=r"train-00.tar may be a class or a part .* --label-from tar .* give --labels"):
        listed(tmp_path / "src", tmp_path)
    assert listed(tmp_path / "src", tmp_path, label_from="tar").classes == ["train-00", "train-01"]


def test_labels_from_two_places(tmp_path: Path) -> None:
    files = {"a/1.jpg": IMAGE, "a/1.json": b'{"label": 0}', "b/2.jpg": IMAGE, "b/2.json": b'{"label": 6}'}
    tar(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match=r"x.tar: labels may be from json or folder; choose with --label-from"):
        listed(tmp_path / "x.tar", tmp_path)
    assert listed(tmp_path / "x.tar", tmp_path, label_from="json").labels.tolist() == [0, 6]
    assert listed(tmp_path / "x.tar", tmp_path, label_from="folder").classes == ["a", "b"]


def test_one_folder_a_tar_of_another_name(tmp_path: Path) -> None:
    for shard, name in enumerate("ab"):
        tar(tmp_path / "src" / f"part{shard}.tar", {f"{name}/1.jpg": IMAGE})
    with pytest.raises(UserError, match="labels may be from folder or tar"):
        listed(tmp_path / "src", tmp_path)


def test_splits_are_no_classes(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {"train/a/1.jpg": IMAGE, "val/a/1.jpg": IMAGE})
    with pytest.raises(UserError, match="images lie in several folders of classes .train, val.; make a tar of each"):
        listed(tmp_path / "x.tar", tmp_path)
    for name in ("train", "val"):
        tar(tmp_path / "tars" / f"{name}.tar", {"1.jpg": IMAGE})
    with pytest.raises(UserError, match="tars: holds train, val; choose one with --split, or --label-from tar if"):
        listed(tmp_path / "tars", tmp_path)
    assert listed(tmp_path / "tars", tmp_path, label_from="tar").classes == ["train", "val"]
    with pytest.raises(UserError, match="train.tar: its images carry no labels"):
        listed(tmp_path / "tars", tmp_path, split="train")
    with pytest.raises(UserError, match=r"\(train, val\) are splits without classes"):
        listed(folder(tmp_path / "src", "train/1.jpg", "val/1.jpg"), tmp_path)


def shard(path: Path, key: str, label: bytes = b"0") -> None:
    tar(path, {f"{key}.jpg": IMAGE, f"{key}.cls": label})


@pytest.mark.parametrize("url", [False, True])
def test_one_split_of_several_in_tars_is_chosen(url: bool, tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in ("imagenet1k-train-0000", "imagenet1k-train-0001", "imagenet1k-validation-00"):
        shard(src / f"{name}.tar", name[-2:])
    path: str | Path = src
    if url:
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").put(str(src), "/splits", recursive=True)
        path = "memory://splits/*.tar"
    with pytest.raises(UserError, match="holds train, validation; choose one with --split"):
        listed(path, tmp_path)
    names = [f"imagenet1k-train-000{i}.tar/0{i}.jpg" for i in range(2)]
    assert listed(path, tmp_path, split="train").names == names
    with pytest.raises(UserError, match="^--split 'val': .* holds train, validation; choose one of them"):
        listed(path, tmp_path, split="val")


@pytest.mark.parametrize("names", [("train_images", "val_images"), ("trainset-00", "valset-00"), ("train_split", "x")])
def test_a_split_anywhere_in_the_names_of_tars_that_are_no_classes(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        shard(tmp_path / "src" / f"{name}.tar", "a")
    with pytest.raises(UserError, match="holds .* with --split|holds .*; choose .* with --split"):
        listed(tmp_path / "src", tmp_path)
    split = {"train_images": "train", "trainset-00": "trainset"}.get(names[0])
    if split:
        assert listed(tmp_path / "src", tmp_path, split=split).names == [f"{names[0]}.tar/a.jpg"]


@pytest.mark.parametrize("form", ["imagenet-1k-{}", "2012_{}", "part-00000-{}"])
def test_parquet_whose_split_comes_behind_a_number(form: str) -> None:
    assert [split_of(f"{form.format(split)}.parquet") for split in ("train", "val")] == ["train", "val"]


def test_names_of_tars_that_are_no_splits(tmp_path: Path) -> None:
    names = ("n01440764", "test-tube", "train-part")
    for name in names:
        tar(tmp_path / "src" / f"{name}.tar", {"1.jpg": IMAGE})
    assert listed(tmp_path / "src", tmp_path).classes == sorted(names)
    with pytest.raises(UserError, match="split 'train': no tar in .*src is called so; leave it out"):
        listed(tmp_path / "src", tmp_path, split="train")


@pytest.mark.parametrize(
    ("names", "split"),
    [(("ds-0", "ds-1", "ds-val-0"), "val"), (("part-0", "dev-0"), "dev"), (("extra", "eval"), "eval")],
)
def test_tars_of_which_only_some_name_their_split(names: tuple[str, ...], split: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in names:
        shard(src / f"{name}.tar", name)
    held = (
        rf"src: holds {split} \({names[-1]}.tar\) and files without a split in their names \({names[-2]}.tar\); choose"
    )
    labels = tmp_path / "labels"
    labels.write_text("".join(f"{name}.jpg 0\n" for name in names))
    for options in ({}, {"labels": str(labels)}, {"label_from": "cls"}):
        with pytest.raises(UserError, match=f"{held} {split} with --split, or move the files of each split to"):
            listed(src, tmp_path, **options)
    with pytest.raises(UserError, match=f"^--split 'train': .*{held}"):
        listed(src, tmp_path, split="train")
    assert listed(src, tmp_path, split=split).names == [f"{names[-1]}.tar/{names[-1]}.jpg"]


def test_another_split_than_that_of_all_tars(tmp_path: Path) -> None:
    for name in ("train-0", "train-1"):
        shard(tmp_path / "src" / f"{name}.tar", name)
    assert len(listed(tmp_path / "src", tmp_path)) == 2
    for split in ("dev", "eval", "holdout"):
        with pytest.raises(UserError, match=f"^--split '{split}': .*src holds train; choose one of them"):
            listed(tmp_path / "src", tmp_path, split=split)
        shard(tmp_path / f"{split}-0.tar", split)
        assert len(listed(tmp_path / f"{split}-0.tar", tmp_path, split=split)) == 1


@pytest.mark.parametrize("within", ["", "{}/"])
def test_a_class_called_train(within: str, tmp_path: Path) -> None:
    names = ("bullet train", "bus", "n01440764")
    for name in names:
        tar(tmp_path / "src" / f"{name}.tar", {f"{within.format(name)}1.jpg": IMAGE})
    assert listed(tmp_path / "src", tmp_path).classes == list(names)


def test_class_tars_within_tars_of_which_only_some_name_their_split(tmp_path: Path) -> None:
    for name in ("img", "img_val"):
        tar(tmp_path / "src" / f"{name}.tar", {"n01440764.tar": tar_bytes({f"{name}.jpg": IMAGE})})
    with pytest.raises(UserError, match=r"holds val \(img_val.tar\) and files without a split .* \(img.tar\)"):
        listed(tmp_path / "src", tmp_path)


def test_files_beside_folders_of_splits(tmp_path: Path) -> None:
    src = tmp_path / "src"
    (src / "train").mkdir(parents=True)
    shard(src / "train" / "0.tar", "0")
    shard(src / "1.tar", "1")
    for options in ({}, {"split": "train"}, {"kind": "tar"}):
        with pytest.raises(UserError, match="holds 1.tar and, in a folder, train/0.tar; convert the folder train by"):
            listed(src, tmp_path, **options)
    assert listed(src / "1.tar", tmp_path).names == ["1.tar/1.jpg"]


@pytest.mark.parametrize("above", ["", "default", "data"])
def test_folders_of_splits(above: str, tmp_path: Path) -> None:
    """As the hub's converted files lie, and as tars may."""
    src = tmp_path / "src"
    for label, split in enumerate(("train", "test")):
        (src / "parquet" / above / split).mkdir(parents=True)
        parquet(src / "parquet" / above / split / "0000.parquet", [label], names=["ant", "bee"])
        (src / "tar" / above / split).mkdir(parents=True)
        shard(src / "tar" / above / split / "0000.tar", split)
    for kind, labels in (("parquet", [1]), ("tar", [0])):
        with pytest.raises(UserError, match=f"{kind}: holds test, train; choose one with --split"):
            listed(src / kind, tmp_path)
        listing = listed(src / kind, tmp_path, split="test")
        assert listing.labels.tolist() == labels and not listing.ignored and not listing.faults
        assert f"test/0000.{kind}" in listing.names[0]
    manifest = convert(str(src / "tar"), str(tmp_path / "x.beton"), settings=ConvertSettings(split="test"), workers=1)
    assert manifest["samples"] == 1


@pytest.mark.parametrize("column", ["split", "Subset"])
def test_a_label_file_with_a_column_of_splits(column: str, tmp_path: Path) -> None:
    src = folder(tmp_path / "src", "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    labels = tmp_path / "labels.csv"
    rows = f"image,breed,{column}\na.jpg,ant,train\nb.jpg,bee,val\nc.jpg,bee,train\n"
    labels.write_text(rows)
    with pytest.raises(UserError, match="^--labels .*labels.csv: holds train, val; choose one with --split"):
        listed(src, tmp_path, labels=str(labels))
    listing = listed(src, tmp_path, labels=str(labels), split="train")
    assert classes_of(listing) == {"a.jpg": "ant", "c.jpg": "bee"} and listing.ignored == ["b.jpg"]
    assert [name for name, _ in listing.faults] == ["d.jpg"]
    with pytest.raises(UserError, match="split 'test': --labels .* holds train, val; choose one of them"):
        listed(src, tmp_path, labels=str(labels), split="test")
    tar(tmp_path / "x.tar", {f"{name}.jpg": IMAGE for name in "abc"})
    assert listed(tmp_path / "x.tar", tmp_path, labels=str(labels), split="val").names == ["x.tar/b.jpg"]
    labels.write_text(rows.replace("val", "train"))
    assert len(listed(src, tmp_path, labels=str(labels))) == 3
    labels.write_text("image,split\na.jpg,train\nb.jpg,val\nc.jpg,train\nd.jpg,val\n")  # they are the labels
    assert listed(src, tmp_path, labels=str(labels)).classes == ["train", "val"]


def test_parquet_with_a_column_of_splits(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {"image": [IMAGE] * 3, "label": [0, 0, 1], "split": ["train", "val", "train"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet: holds train, val; choose one with --split"):
        listed(tmp_path / "x.parquet", tmp_path)
    assert listed(tmp_path / "x.parquet", tmp_path, split="train").labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="split 'test': .*x.parquet holds train, val"):
        listed(tmp_path / "x.parquet", tmp_path, split="test")
    with pytest.raises(UserError, match="split 'test': .*y.parquet is not called so, and has no column split"):
        listed(parquet(tmp_path / "y.parquet", [0]), tmp_path, split="test")
    src = tmp_path / "src"
    src.mkdir()
    (tmp_path / "x.parquet").rename(src / "train-0.parquet")
    parquet(src / "train-1.parquet", [0])  # no column: the name is enough
    parquet(src / "test-0.parquet", [1])
    names = ["train-0.parquet/0", "train-0.parquet/2", "train-1.parquet/0"]
    assert listed(src, tmp_path, split="train").names == names
    with pytest.raises(UserError, match="split 'val': .*src holds test, train; choose one of them"):
        listed(src, tmp_path, split="val")
    assert listed(src / "train-0.parquet", tmp_path, split="val").names == ["train-0.parquet/1"]
    pq.write_table(pa.table(columns | {"split": ["val", "test", "val"]}), src / "train-0.parquet")
    with pytest.raises(UserError, match="split 'train': .*src holds test, val; choose one of them"):
        listed(src, tmp_path, split="train")


def test_mixed_names_of_parquet(tmp_path: Path) -> None:
    for name in ("0000", "test-0000"):
        parquet(tmp_path / f"{name}.parquet", [0])
    with pytest.raises(
        UserError, match=r"holds test \(test-0000.parquet\) and files without .* \(0000.parquet\); choose"
    ):
        listed(tmp_path, tmp_path)


def test_a_label_file_comes_before_cls(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {"1.jpg": IMAGE, "1.cls": b"0", "2.jpg": IMAGE})
    (tmp_path / "labels").write_text("1.jpg 4\n2.jpg 0\n")
    listing = listed(tmp_path / "x.tar", tmp_path, labels=str(tmp_path / "labels"))
    assert listing.labels.tolist() == [4, 0] and not listing.faults


# folders


def test_a_label_file_within_the_folder(tmp_path: Path) -> None:
    """It is no image: the count is right, and so is the order."""
    src = folder(tmp_path / "src", "a.jpg", "b.jpg", "z.jpg")
    labels = src / "labels.csv"
    labels.write_text("5\n0\n7\n")
    assert listed(src, tmp_path, labels=str(labels)).labels.tolist() == [5, 0, 7]
    labels.write_text("5\n0\n")
    with pytest.raises(UserError, match="2 lines for 3 images; give one each"):
        listed(src, tmp_path, labels=str(labels))
    labels.write_text("5\n0\n7\n")
    (src / "README").write_text("not an image")
    listing = listed(src, tmp_path, labels=str(labels))
    assert listing.labels.tolist() == [5, 0, 7] and [name for name, _ in listing.faults] == ["README"]


def test_a_label_file_comes_before_folders(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", "x/0.jpg", "y/0.jpg", "y/z/1.jpg", "y/.b/1.jpg", "2.jpg", "__MACOSX/x/0.jpg")
    labels = src / "y" / "labels.csv"
    labels.write_text("x/0.jpg,ant\ny/0.jpg,bee\ny/z/1.jpg,ant\n2.jpg,bee\n")
    listing = listed(src, tmp_path, labels=str(labels))
    assert classes_of(listing) == {"2.jpg": "bee", "x/0.jpg": "ant", "y/0.jpg": "bee", "y/z/1.jpg": "ant"}
    assert listing.ignored == ["__MACOSX"] and [name for name, _ in listing.faults] == ["y/.b"]
    (src / "y" / ".b" / "1.jpg").unlink()
    manifest = convert(str(src), str(tmp_path / "x.beton"), settings=ConvertSettings(labels=str(labels)), workers=1)
    assert manifest["samples"] == 4
    labels.write_text("0.jpg,ant\n")
    with pytest.raises(UserError, match="'0.jpg' may mean x/0.jpg or y/0.jpg; write names with their folders"):
        listed(src, tmp_path, labels=str(labels))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="labels.csv: the source holds no image that it could label; give an image fol"):
        listed(tmp_path / "empty", tmp_path, labels=str(labels))


COMPOSED, DECOMPOSED = "\u00c4rger", "A\u0308rger"


@pytest.mark.parametrize(("given", "own"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_class_names_in_either_unicode_form(given: str, own: str, tmp_path: Path) -> None:
    """Folders that macOS wrote, against a list of others: the list's spelling is stored."""
    classes = tmp_path / "classes"
    classes.write_text(f"b\n{given}\n7\n", encoding="utf-8")
    sources = [folder(tmp_path / "src", f"{own}/1.jpg"), tmp_path / "a.tar", tmp_path / "b.tar"]
    tar(tmp_path / "a.tar", {f"{own}/1.jpg": IMAGE, "b/2.jpg": IMAGE})
    tar(tmp_path / "b.tar", {"1.jpg": IMAGE, "1.cls": own.encode(), "2.jpg": IMAGE, "2.cls": b"7"})
    for src, labels in zip(sources, ([1], [1, 0], [1, 2]), strict=True):
        listing = listed(src, tmp_path, classes=str(classes))
        assert listing.labels.tolist() == labels and listing.classes == ["b", given, "7"]
    for name in (given, own):
        tar(tmp_path / "same" / f"{name}.tar", {f"{own}/1.jpg": IMAGE})
    with pytest.raises(UserError, match=f"two classes are called '{COMPOSED}'; rename one"):
        listed(tmp_path / "same", tmp_path, label_from="tar")


@pytest.mark.parametrize("src", ["d.zip", "d.tar.gz", "https://host/d.zip?key=secret"])
def test_a_compressed_source_is_to_be_unpacked(src: str, tmp_path: Path) -> None:
    path = src if "://" in src else folder(tmp_path, src) / src
    with pytest.raises(UserError, match=r"d\.(zip|tar.gz): a compressed archive .* unpack it and give the folder"):
        listed(path, tmp_path)


def test_hidden_folders_and_loose_images_are_faults(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", "a/1.jpg", ".b/1.jpg", "loose.jpg", ".git/logo.png", "__MACOSX/a/x.jpg")
    (src / "README.txt").write_text("")
    listing = listed(src, tmp_path)
    assert dict(listing.faults) == {
        ".b": "a hidden folder that holds images: rename it if it is a class, or remove it",
        "loose.jpg": "an image beside the files that are converted: not read",
    }
    assert listing.classes == ["a"] and sorted(listing.ignored) == [".git", "README.txt", "__MACOSX"]
    assert FolderSource(str(src)).class_names == ["a"]
    tar(tmp_path / "x.tar", {"a/1.jpg": IMAGE, "b/2.jpg": IMAGE, "__MACOSX/a/3.jpg": IMAGE, "b/@eaDir/4.jpg": IMAGE})
    listing = listed(tmp_path / "x.tar", tmp_path)
    assert listing.classes == ["a", "b"] and listing.ignored == ["x.tar/__MACOSX/a/3.jpg", "x.tar/b/@eaDir/4.jpg"]


def test_folders_named_by_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the order of torchvision's ImageFolder, which is said; `classes` gives another."""
    src = folder(tmp_path / "src", *(f"{i}/x.jpg" for i in (0, 1, 2, 10)))
    with caplog.at_level(logging.INFO, "std_fast"):
        manifest = convert(str(src), str(tmp_path / "x.beton"), workers=1)
    assert manifest["classes"] == ["0", "1", "10", "2"]
    assert "4 images of 4 classes: 0 = 0, 1 = 1, 2 = 10, 3 = 2" in caplog.text
    assert "class names are numbers in the order of text, as torchvision's ImageFolder has them" in caplog.text
    (tmp_path / "names").write_text("0\n1\n2\n3\n10\n")
    caplog.clear()
    with caplog.at_level(logging.INFO, "std_fast"):
        settings = ConvertSettings(classes=str(tmp_path / "names"))
        manifest = convert(str(src), str(tmp_path / "y.beton"), settings=settings, workers=1)
    assert manifest["classes"] == ["0", "1", "2", "3", "10"] and "order of text" not in caplog.text
    assert "1 of the classes have no image, e.g. 3" in caplog.text


def test_a_folder_of_several_kinds(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", "a/1.jpg", "b/1.jpg")
    tar(src / "a.tar", {"1.jpg": IMAGE, "2.jpg": IMAGE})
    with pytest.raises(UserError, match="could be of kind tar or folder; choose with `kind`"):
        listed(src, tmp_path)
    listing = listed(src, tmp_path, kind="folder")
    assert len(listing) == 2 and listing.ignored == ["a.tar"]
    assert len(listed(src, tmp_path, kind="tar", label_from="tar")) == 2


def test_what_lies_beside_tars(tmp_path: Path) -> None:
    for name in "ab":
        tar(tmp_path / "src" / f"{name}.tar", {"1.jpg": IMAGE})
    (tmp_path / "src" / "c.tar.gz").write_bytes(b"")
    (tmp_path / "src" / "README").write_bytes(b"")
    listing = listed(tmp_path / "src", tmp_path)
    assert listing.ignored == ["README"]
    assert listing.faults == [("c.tar.gz", "a compressed archive cannot be read in place: unpack it, or remove it")]
    with pytest.raises(DataError, match="c.tar.gz .a compressed archive"):
        convert(str(tmp_path / "src"), str(tmp_path / "x.beton"), workers=1)


def test_options_that_do_nothing_are_refused(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", "a/1.jpg")
    with pytest.raises(UserError, match="split 'train': .*src is an image folder; convert the folder of"):
        listed(src, tmp_path, split="train")
    with pytest.raises(UserError, match="label-from 'json': .* holds no tars"):
        listed(src, tmp_path, label_from="json")
    with pytest.raises(UserError, match="--label-key: .*src is of kind folder, without columns or keys; leave it out"):
        listed(src, tmp_path, label_key="label")
    (tmp_path / "labels.txt").write_text("1.jpg 0\n")
    flat = folder(tmp_path / "flat", "1.jpg")
    with pytest.raises(UserError, match="labels.txt: no table with a header .*; leave --label-key out"):
        listed(flat, tmp_path, labels=str(tmp_path / "labels.txt"), label_key="label")
    tar(tmp_path / "x.tar", {"1.jpg": IMAGE, "1.cls": b"7", "1.json": b'{"breed": 0}'})
    with pytest.raises(UserError, match="--label-key: .* the labels of .*x.tar are from cls; .* --label-from json"):
        listed(tmp_path / "x.tar", tmp_path, label_key="breed")
    assert listed(tmp_path / "x.tar", tmp_path, label_from="json", label_key="breed").labels.tolist() == [0]
    for options in ({"raw_share": 0.3}, {"side": "longest"}, {"quality": 80, "mode": "raw"}):
        with pytest.raises(UserError, match=r"--(raw-share|side|quality): needs --.*, or leave it out"):
            ConvertSettings(**options)


def test_files_that_are_not_there_are_named_with_their_option(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", "a/1.jpg")
    for option in ("labels", "classes"):
        with pytest.raises(UserError, match=f"--{option} /no/devkit.tar.gz: no such file; correct the path"):
            listed(src, tmp_path, **{option: "/no/devkit.tar.gz"})


def test_a_source_of_faults_alone_has_no_classes(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"1.jpg": IMAGE, "1.cls": b""})
    assert listed(tmp_path / "a.tar", tmp_path).classes == []


# parquet and CIFAR


def parquet(path: Path, labels: list, column: str = "label", names: list[str] | None = None) -> Path:
    pytest.importorskip("pyarrow")
    return write_parquet(path, [IMAGE] * len(labels), labels, column, names)


@pytest.mark.parametrize("labels", [["0", "2", "10"], [0.0, 2.0, 10.0], ["0.0", "2.0", "10.0"]])
def test_parquet_labels_as_text_or_floats(labels: list, tmp_path: Path) -> None:
    assert listed(parquet(tmp_path / "x.parquet", labels), tmp_path).labels.tolist() == [0, 2, 10]


def test_parquet_labels_of_text(tmp_path: Path) -> None:
    listing = listed(parquet(tmp_path / "x.parquet", ["wire fox", "ant", ""]), tmp_path)
    assert listing.classes == ["ant", "wire fox"] and listing.labels.tolist() == [1, 0]
    assert listing.faults == [("x.parquet/2", "the row has no label")]
    column = f"^{tmp_path}/y.parquet: the column of labels"
    with pytest.raises(UserError, match=f"{column}: some labels are numbers .1. and others names .ant."):
        listed(parquet(tmp_path / "y.parquet", ["1", "ant"]), tmp_path)
    with pytest.raises(UserError, match="label 0.5 is no class number"):
        listed(parquet(tmp_path / "z.parquet", [0.5, 1.0]), tmp_path)
    with pytest.raises(
        UserError, match=f"^{tmp_path}/w.parquet: w.parquet/1 has label 2000000, and labels must lie in"
    ):
        listed(parquet(tmp_path / "w.parquet", [0, 2_000_000]), tmp_path)


def test_parquet_rows_without_a_label(tmp_path: Path) -> None:
    """The hub's test splits hold -1."""
    faults = listed(parquet(tmp_path / "x.parquet", [0, -1, None]), tmp_path).faults
    assert faults == [("x.parquet/1", "label -1 (an unlabelled test split?)"), ("x.parquet/2", "the row has no label")]
    with pytest.raises(UserError, match=r"y.parquet: label is a list, not one class; .* --label-key"):
        listed(parquet(tmp_path / "y.parquet", [[0], [1]]), tmp_path)


def test_parquet_label_key(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", [1, 0], column="breed")
    with pytest.raises(UserError, match="no column label or .* among image, breed; name the right one by --label-key"):
        listed(path, tmp_path)
    assert listed(path, tmp_path, label_key="breed").labels.tolist() == [1, 0]


def test_given_classes_reorder_those_of_the_source(tmp_path: Path) -> None:
    """Numbers mean the source's own classes; they keep their names when `classes` has another order."""
    path = parquet(tmp_path / "x.parquet", [0, 1, 2], names=["ant", "bee", "cat"])
    (tmp_path / "names").write_text("cat\nant\nbee\n")
    assert list(classes_of(listed(path, tmp_path)).values()) == ["ant", "bee", "cat"]
    assert list(classes_of(listed(path, tmp_path, classes=str(tmp_path / "names"))).values()) == ["ant", "bee", "cat"]


def test_cifar_split_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(UserError, match="split 'train': not in"):
        listed(tmp_path / "src", tmp_path, split="train")
    assert len(listed(tmp_path / "src", tmp_path, split="test")) == 1


def test_files_of_a_data_set_that_are_missing(tmp_path: Path) -> None:
    """Their names say how many there are; a file that is named by itself is enough."""
    src = tmp_path / "src"
    src.mkdir()
    for part in (0, 2):
        parquet(src / f"train-{part:05}-of-00004.parquet", [0, 1])
    reason = "this file of the data set is missing"
    missing = [f"train-0000{part}-of-00004.parquet" for part in (1, 3)]
    assert listed(src, tmp_path).faults == [(name, reason) for name in missing]
    with pytest.raises(DataError, match="2 of 6 images cannot be converted: train-00001-of-00004.parquet .this file"):
        convert(str(src), str(tmp_path / "x.beton"), workers=1)
    assert listed(src / "train-00000-of-00004.parquet", tmp_path).faults == []
    tar(tmp_path / "tars" / "x-0-of-2.tar", {"1.jpg": IMAGE, "1.cls": b"0"})
    assert listed(tmp_path / "tars", tmp_path).faults == [("x-1-of-2.tar", reason)]


def test_gaps_between_numbered_files_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not between class tars, whose numbers count nothing."""
    for number in (8, 9, 11):
        shard(tmp_path / "a" / f"train-0000{number:02}.tar", str(number))
    (tmp_path / "b").mkdir()
    for number in (0, 2):
        parquet(tmp_path / "b" / f"part-0000{number}.parquet", [0])
    (tmp_path / "c").mkdir()
    for number in (1, 2, 4, 5):
        (tmp_path / "c" / f"data_batch_{number}.bin").write_bytes(bytes(3073))
    for src in "abc":
        assert not listed(tmp_path / src, tmp_path).faults
    said = [
        "1 of the files between train-000008.tar and train-000011.tar are not there, e.g. train-000010.tar: add them",
        "1 of the files between part-00000.parquet and part-00002.parquet are not there, e.g. part-00001.parquet",
        "1 of the files between data_batch_1.bin and data_batch_5.bin are not there, e.g. data_batch_3.bin",
    ]
    assert len(caplog.messages) == 3 and all(map(str.__contains__, caplog.messages, said))
    caplog.clear()
    for name in ("n01440764", "n01443537", "n01484850"):
        tar(tmp_path / "d" / f"{name}.tar", {"1.jpg": IMAGE})
    assert listed(tmp_path / "d", tmp_path).classes[0] == "n01440764" and not caplog.messages


def test_parquet_files_called_by_numbers(tmp_path: Path) -> None:
    """The hub's converted files; they are no splits."""
    (tmp_path / "src").mkdir()
    for part in range(2):
        parquet(tmp_path / "src" / f"000{part}.parquet", [part])
    assert listed(tmp_path / "src", tmp_path).labels.tolist() == [0, 1]
