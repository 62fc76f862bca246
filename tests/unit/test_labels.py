"""Label files of every layout give each image its own label, or are refused with the way out."""

import logging
from pathlib import Path

import pytest

from pipelines.convert.labels import parse_labels, read_classes, read_labels
from pipelines.errors import UserError

TWELVE = [f"i{i}.png" for i in range(12)]
NUMBERS = {name: i for i, name in enumerate(TWELVE)}


def labels_of(text: str | bytes, names: list[str], tmp_path: Path, **options: object) -> dict:
    path = tmp_path / "labels.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_labels(str(path), names, **options)[0]


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("", "{name},{i}"),
        ("image_id,label\n", "{name},{i}"),  # a header of no known words
        ("\ufeffimage,label\n", "{name},{i}"),  # a byte order mark, as Excel writes it
        ("\ufeff", "{name} {i}"),
        ("", "{name},{i}.0"),  # as pandas writes a column that had a gap
        ("", "{name}\t{i}"),
        ("", "{name};{i}"),
        ("", "{name}   {i}"),
        ("what which\n", "{name} {i}"),
        ("", '"{name}","{i}"'),
        ("", "./images/{name},{i}"),
        ("label,image\n", "{i},{name}"),
        ("id,filename,label,width\n", "{i},{name},{i},640"),
        ("", "{stem},{i}"),
        ("Id,Class\r\n", "{stem},{i}\r"),
    ],
)
def test_numbers_stay_the_numbers_of_the_file(head: str, row: str, tmp_path: Path) -> None:
    rows = [row.format(name=name, stem=name[:-4], i=i) for i, name in enumerate(TWELVE)]
    assert labels_of(head + "\n".join(rows) + "\n", TWELVE, tmp_path) == NUMBERS


@pytest.mark.parametrize("gap", [" ", "\t", ","])
def test_names_of_several_words(gap: str, tmp_path: Path) -> None:
    names = ["my cat.jpg", "my.jpg", "dog (1).jpg"]
    rows = [f"my cat.jpg{gap}tabby cat", f"my.jpg{gap}golden retriever", f"dog (1).jpg{gap}golden retriever"]
    expected = dict(zip(names, ("tabby cat", "golden retriever", "golden retriever"), strict=True))
    assert labels_of("\n".join(rows), names, tmp_path) == expected


def test_lines_of_class_names_of_several_words(tmp_path: Path) -> None:
    assert labels_of("Cessna 172\ngolden retriever\n", ["b.jpg", "a.jpg"], tmp_path) == {
        "a.jpg": "Cessna 172",
        "b.jpg": "golden retriever",
    }


def test_lines_of_labels_need_names_of_a_certain_order(tmp_path: Path) -> None:
    """As text, i10 comes before i2; padded with zeros, both orders are one."""
    lines = "".join(f"{i}\n" for i in range(12))
    with pytest.raises(
        UserError, match=r"order of the names is not certain \(i10.png comes before i2.png as text.*NAME"
    ):
        labels_of(lines, TWELVE, tmp_path)
    padded = [f"v2_{i:08}.JPEG" for i in range(12)]
    assert labels_of(lines, padded[::-1], tmp_path) == {name: i for i, name in enumerate(padded)}


def test_a_header_above_lines_of_labels(tmp_path: Path) -> None:
    assert labels_of("label\n1\n0\n", ["a.jpg", "b.jpg"], tmp_path) == {"a.jpg": 1, "b.jpg": 0}


def test_tiny_imagenets_annotations(tmp_path: Path) -> None:
    text = "val_0.JPEG\tn03444034\t0\t32\t44\t62\nval_1.JPEG\tn04067472\t52\t55\t57\t59\n"
    assert labels_of(text, ["val_0.JPEG", "val_1.JPEG"], tmp_path) == {
        "val_0.JPEG": "n03444034",
        "val_1.JPEG": "n04067472",
    }


def test_paths_tell_images_of_one_name_apart(tmp_path: Path) -> None:
    names = ["x.tar/a/1.jpg", "x.tar/b/1.jpg"]
    assert labels_of("a/1.jpg 0\nb/1.jpg 1", names, tmp_path) == {names[0]: 0, names[1]: 1}
    with pytest.raises(UserError, match=r"'1.jpg' may mean x.tar/a/1.jpg or x.tar/b/1.jpg; write names with their fol"):
        labels_of("1.jpg 0\n", names, tmp_path)


@pytest.mark.parametrize("gap", [",", " "])
def test_names_in_either_unicode_form(gap: str, tmp_path: Path) -> None:
    """As macOS writes the names of files, and as others write those in a list."""
    for there, here in (("A\u0308.jpg", "\u00c4.jpg"), ("\u00c4.jpg", "A\u0308.jpg")):
        assert labels_of(f"{here}{gap}0\n", [there], tmp_path) == {there: 0}


def test_the_label_column_is_chosen_by_its_name(tmp_path: Path) -> None:
    text = "image,label,category\na.jpg,0,ant\nb.jpg,1,bee\n"
    with pytest.raises(UserError, match="columns image, label, category is the label is not certain"):
        labels_of(text, ["a.jpg", "b.jpg"], tmp_path)
    assert labels_of(text, ["a.jpg", "b.jpg"], tmp_path, key="category") == {"a.jpg": "ant", "b.jpg": "bee"}
    with pytest.raises(UserError, match=r"no column 'class' \(--label-key\) among image, label, category"):
        labels_of(text, ["a.jpg", "b.jpg"], tmp_path, key="class")


def test_lines_of_other_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "std_fast"):
        assert labels_of("a.jpg 0\nb.jpg 1\nc.jpg 2\n", ["a.jpg"], tmp_path) == {"a.jpg": 0}
    assert "lines that name no image of the source: 2, e.g. b.jpg" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["a.jpg 0\nzz.jpg 1\n", "zz.jpg 1\na.jpg 0\n", "zz.jpg,1\na.jpg,0\n", "name label\na.jpg 0\nzz 1\n", "zz 1\na 0\n"],
)
def test_one_line_of_another_image_is_said_wherever_it_stands(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert labels_of(text, ["a.jpg"], tmp_path) == {"a.jpg": 0}
    assert "lines that name no image of the source: 1, e.g. zz" in caplog.text


@pytest.mark.parametrize("text", ["# by hand\n{}", "#name,label\n{}", "{}\n# the end\n"])
@pytest.mark.parametrize("rows", ["a.jpg,1\nb.jpg,0", "a.jpg 1\nb.jpg 0", "1\n0"])
def test_comments_are_no_labels(text: str, rows: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert labels_of(text.format(rows), ["a.jpg", "b.jpg"], tmp_path) == {"a.jpg": 1, "b.jpg": 0}
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\nb.jpg cat\n", "labels are numbers .0. and others names .cat.; write one kind, or give --classes"),
        ("a.jpg 0.5\nb.jpg 1\n", "label 0.5 is no class number"),
        ("a.jpg 0x0\nb.jpg 0x1f\n", "labels such as 0x0 may be numbers or names; write decimal numbers, or give --cl"),
        ("a.jpg 0\na.jpg 1\nb.jpg 0\n", "a.jpg has two labels, 0 and 1; keep one"),
        ("x.jpg 0\ny.jpg 1\n", "an image's name and its label: its first is 'x.jpg 0', an image is called 'a.jpg'"),
        ("x,0\ny,1\n", "no line is an image's name and its label"),
        ("a.jpg:0\nb.jpg:1\n", "no line is an image's name and its label"),
        ("a|ant\nb|bee\n", "no line is an image's name and its label"),
        ("ant a.jpg\nbee b.jpg\n", "no line is an image's name and its label"),
        ('{"a.jpg": 0, "b.jpg": 1}', "no line is an image's name and its label"),
        ("a.jpg\nb.jpg\n", "its lines name images, and no labels"),
        ("0\n1\n0\n", "3 lines for 2 images; give one each"),
        ("a.jpg 1\nb.jpg 2\n", "numbers begin at 1; .* give the devkit .* or give --classes"),
        ("a.jpg,7,9\nb.jpg,8,9\n", "3 columns without a header; keep name and label"),
        ("", "is empty"),
        (b"\xff\xfea\x00", "cannot be read as text"),
    ],
)
def test_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        labels_of(text, ["a.jpg", "b.jpg"], tmp_path)


def test_a_name_and_label_that_could_be_cut_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="may mean 'a' or 'a b'; put a tab"):
        labels_of("a b c\n", ["a.jpg", "a b.jpg"], tmp_path)


def test_numbers_as_names_of_classes() -> None:
    """Where a number is also the name of another class, neither meaning is taken."""
    assert parse_labels(["0", "1", "10"], ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"], "x") == [0, 1, 10]
    with pytest.raises(UserError, match="x: label 10 may be class number 10 or the class named '10', number 2 of --cl"):
        parse_labels(["0", "1", "10"], ["0", "1", "10", "2"], "x")
    assert parse_labels(["0", "cat"], ["cat", "0"], "x") == ["0", "cat"]
    assert parse_labels(["1", "3.0", "1e1"], None, "x") == [1, 3, 10]


def test_class_lists(tmp_path: Path) -> None:
    path = tmp_path / "classes"
    for text in (
        "\ufeffgolden retriever\nant\n",
        "# in order\ngolden retriever\nant\n",
        '["golden retriever", "ant"]',
        '\ufeff{"classes": ["golden retriever", "ant"]}',
    ):
        path.write_text(text, encoding="utf-8")
        assert read_classes(str(path)) == ["golden retriever", "ant"]
    path.write_text("#1\nant\n", encoding="utf-8")
    assert read_classes(str(path)) == ["#1", "ant"]
    path.write_text("ant\nbee\n\n \n", encoding="utf-8")
    assert read_classes(str(path)) == ["ant", "bee"]
    path.write_text("# in order\nant\n\nbee\n", encoding="utf-8")
    with pytest.raises(UserError, match="classes: line 3 is empty; name a class there or remove it"):
        read_classes(str(path))
    with pytest.raises(UserError, match="cannot be read as text .Is a directory.; give a text file"):
        read_classes(str(tmp_path))
