"""Tables and class folders become manifests, or one clear message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_kit import manifest, records, touch

from eyetune.data.config import DataConfig
from eyetune.data.record import Record
from eyetune.data.records import Manifest, open_manifest
from eyetune.errors import DataError

Table = Callable[..., Path]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Writes a table and files a.jpg … e.jpg beside it."""
    touch(tmp_path, [f"{name}.jpg" for name in "abcde"])

    def write(text: str | bytes, name: str = "t.csv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        Manifest.from_table(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


# Tables that can be read


def test_aptos_names_without_suffix_in_a_folder_named_like_the_table(tmp_path: Path) -> None:
    touch(tmp_path / "train_images", ["000c1434d8d7.png", "001639a390f0.PNG", "0024cdab0c1e.jpeg"])
    (tmp_path / "train.csv").write_text("id_code,diagnosis\n000c1434d8d7,2\n001639a390f0,4\n0024cdab0c1e,0\n")
    read = Manifest.from_csv(tmp_path / "train.csv")
    assert [record.image.name for record in read] == ["000c1434d8d7.png", "001639a390f0.PNG", "0024cdab0c1e.jpeg"]
    assert read.labels == (2, 4, 0)
    assert read.classes == ("0", "1", "2", "3", "4")
    assert [record.name for record in read] == ["000c1434d8d7", "001639a390f0", "0024cdab0c1e"]
    assert read[1].row == "train.csv row 3"
    assert {"image column: id_code", "label column: diagnosis"} <= set(read.notes)
    assert "no image has label 1, 3 (labels run 0..4)" in read.notes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("image,label\na.jpg,1\nb.jpg,0\n", "t.csv"),
        ("\ufeffimage,label\r\na.jpg,1\r\nb.jpg,0\r\n", "t.csv"),
        ("image;label\na.jpg;1\nb.jpg;0\n", "t.csv"),
        ("image\tlabel\na.jpg\t1\nb.jpg\t0\n", "t.tsv"),
        ("image\tlabel\na.jpg\t1\nb.jpg\t0\n", "t.csv"),
        ("Image, Label\na.jpg, 1\nb.jpg, 0.0\n\n,\n", "t.csv"),
        ("label,note,image\n1,'a,\n0,x,b.jpg\n".replace("'a,", '"two\nlines, and ""quotes""",a.jpg'), "t.csv"),
        ('{"image": "a.jpg", "label": 1}\n\n{"label": 0, "image": "b.jpg", "age": 40}\n', "t.jsonl"),
    ],
    ids=["plain", "bom", "semicolon", "tsv", "tabs", "spaces", "quoted", "jsonl"],
)
def test_spellings_of_one_table(table: Table, text: str, name: str) -> None:
    read = Manifest.from_table(table(text, name))
    assert [(record.image.name, record.label) for record in read] == [("a.jpg", 1), ("b.jpg", 0)]


def test_columns_by_any_name_and_the_rest_kept(table: Table) -> None:
    path = table("file,label,dme,who,side,part,age\na,9,1,P1,OS,Training,40\nb,9,0,P2,od,validation,50\n")
    read = Manifest.from_table(
        path, label_column="dme", patient_column="who", eye_column="side", split_column="part", image_column="file"
    )
    assert read.labels == (1, 0)
    assert [(r.patient, r.eye, r.split) for r in read] == [("P1", "left", "train"), ("P2", "right", "val")]
    assert read[0].extra == {"label": "9", "age": "40"}


def test_none_ignores_a_standard_column(table: Table) -> None:
    path = table("image,label,split\na,0,1\nb,1,2\n")
    assert "do not say train, val, test" in refused(path)
    assert Manifest.from_table(path, split_column="none").splits == ()


def test_images_in_subfolders_absolute_and_above(tmp_path: Path) -> None:
    touch(tmp_path, ["x/one/a.jpg", "y/b.png", "c.jpg"])
    (tmp_path / "x" / "t.csv").write_text(f"image,label\none/a,0\n{tmp_path}/y/b.png,1\n../c.jpg,1\n")
    read = Manifest.from_table(tmp_path / "x" / "t.csv")
    assert [record.image.resolve() for record in read] == [
        tmp_path / "x/one/a.jpg",
        tmp_path / "y/b.png",
        tmp_path / "c.jpg",
    ]


def test_images_sibling_folder_is_found_and_suffix_may_differ(tmp_path: Path) -> None:
    touch(tmp_path / "images", ["a.PNG", "b.v2.png"])
    (tmp_path / "t.csv").write_text("image,label\nA.jpg,0\nb.v2,1\n")
    read = Manifest.from_table(tmp_path / "t.csv")
    assert [record.image.name for record in read] == ["a.PNG", "b.v2.png"]
    assert any("1 images have another file type" in note for note in read.notes)


def test_one_listing_a_folder_however_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eyetune.data import images

    listed: list[Path] = []
    scan = images.os.scandir
    monkeypatch.setattr(images.os, "scandir", lambda folder: listed.append(folder) or scan(folder))
    touch(tmp_path, [f"{i}.jpg" for i in range(50)])
    (tmp_path / "t.csv").write_text("image,label\n" + "".join(f"{i},{i % 2}\n" for i in range(50)))
    assert len(Manifest.from_table(tmp_path / "t.csv")) == 50
    assert listed == [tmp_path]


def test_labels_are_optional_for_prediction(table: Table) -> None:
    path = table("image\na\nb\n")
    assert Manifest.from_table(path, labels_required=False).labels == (None, None)
    assert Manifest.from_table(path, labels_required=False, label_column="grade").labels == (None, None)
    read = Manifest.from_table(table("image,label\na,\nb,1\n"), classes=("0", "1"), labels_required=False)
    assert read.labels == (None, 1)


# Labels


def test_words_are_classes_in_natural_order(table: Table) -> None:
    read = Manifest.from_table(table("image,label\na,grade10\nb,grade2\nc,grade2\nd,Grade1\n"))
    assert read.classes == ("Grade1", "grade2", "grade10")
    assert read.labels == (2, 1, 1, 0)


def test_given_classes_set_the_order_and_the_members(table: Table) -> None:
    path = table("image,label\na,sick\nb,well\n")
    assert Manifest.from_table(path, classes=("well", "sick")).labels == (1, 0)
    said = refused(path, classes=("well", "sikc"))
    assert "1 labels are none of the classes well, sikc. Did you mean 'sikc'?\n  t.csv row 2: 'sick'" in said


def test_numbers_may_be_indices_or_names_of_given_classes(table: Table) -> None:
    assert Manifest.from_table(table("image,label\na,0\nb,2\n"), classes=("no", "mild", "severe")).labels == (0, 2)
    assert Manifest.from_table(table("image,label\na,1\nb,3\n"), classes=("1", "2", "3")).labels == (0, 2)
    assert "t.csv row 3: '3'" in refused(table("image,label\na,0\nb,3\n"), classes=("no", "mild", "severe"))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (("0", "", "nan", "1", "N/A"), "3 rows have no label; fill them in or remove them:\n  t.csv row 3"),
        (("0", "1", "mild", "2", "1"), "1 labels are words where the others are numbers:\n  t.csv row 4: 'mild'"),
        (("a", "b", "1", "a", "b"), "1 labels are numbers where the others are words:\n  t.csv row 4: '1'"),
        (
            ("0", "1.5", "1", "2", "2"),
            "1 labels are fractions; a class is a whole number 0..K-1:\n  t.csv row 3: '1.5'",
        ),
        (("0", "-1", "1", "2", "2"), "1 labels are below 0; classes are numbered 0..K-1:\n  t.csv row 3: '-1'"),
        (("0", "1", "999", "0", "1"), "the highest label is 999 but only 3 different labels occur"),
        (("0", "1", "1e999", "0", "1"), "1 labels are fractions"),
    ],
)
def test_labels_that_make_no_sense(table: Table, cells: tuple[str, ...], said: str) -> None:
    text = "image,label\n" + "".join(f"{name},{cell}\n" for name, cell in zip("abcde", cells, strict=True))
    assert said in refused(table(text))


def test_first_five_and_how_many_more(tmp_path: Path) -> None:
    touch(tmp_path, [f"{i}.jpg" for i in range(9)])
    (tmp_path / "t.csv").write_text("image,label\n" + "".join(f"{i},7\n" for i in range(9)))
    said = refused(tmp_path / "t.csv", classes=("0", "1"))
    assert said.count("t.csv row") == 5
    assert "… and 4 more" in said


# Tables that cannot be read


def test_missing_table_suggests_the_nearest(table: Table) -> None:
    path = table("image,label\na,0\n", "train.csv")
    assert (
        refused(path.with_name("tarin.csv")) == f"no table at {path.with_name('tarin.csv')}. Did you mean 'train.csv'?"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("image,label\n", "has a header but no rows"),
        ("image,label\na,Schärfe\n".encode("latin1"), "is not UTF-8 text"),
        (b"\xff\xfe" + "image,label\na,0\n".encode("utf-16-le"), "is not UTF-8 text"),
        ("image,label,label\na,0,1\n", "two columns called label"),
        ("image,label\na,0,1\n", "more cells than the 2 columns"),
        ('image,label\n"a,0\n', "not a well-formed table"),
        ("image,label\n,0\n", "1 rows name no image:\n  t.csv row 2"),
        ("image,lable\na,0\n", "no column with a usual name for the label; name it with data.label_column"),
        ("photo,label\na,0\n", "no column with a usual name for the image"),
    ],
)
def test_broken_tables(table: Table, text: str | bytes, said: str) -> None:
    assert said in refused(table(text))


@pytest.mark.parametrize(("line", "said"), [("{bad", "line 2 is not JSON"), ("[1]", "line 2 is not a JSON object")])
def test_broken_jsonl(table: Table, line: str, said: str) -> None:
    assert said in refused(table('{"image": "a", "label": 0}\n' + line, "t.jsonl"))


def test_a_table_that_is_a_folder(tmp_path: Path) -> None:
    assert "cannot read" in refused(tmp_path)


def test_missing_column_names_the_nearest_and_all_there_are(table: Table) -> None:
    said = refused(table("image,diagnosis\na,0\n"), label_column="diagnosys", patient_column="who")
    assert "no column 'diagnosys' (data.label_column). Did you mean 'diagnosis'?" in said
    assert "no column 'who' (data.patient_column)." in said
    assert "Its columns: image, diagnosis." in said


def test_missing_image_folder(table: Table, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    said = refused(table("image,label\na,0\n"), images=tmp_path / "photo")
    assert said == f"no image folder at {tmp_path / 'photo'} (data.images). Did you mean 'photos'?"


def test_missing_images_are_listed_with_their_rows(table: Table, tmp_path: Path) -> None:
    said = refused(table("image,label\na,0\nzzz,1\nb,1\n"))
    assert said == f"{tmp_path / 't.csv'}: 1 of 3 images are not in {tmp_path}:\n  t.csv row 3: zzz"
    assert "none of its 2 images was found. Looked in" in refused(table("image,label\nx,0\ny,1\n"))


def test_a_name_that_fits_two_files(table: Table, tmp_path: Path) -> None:
    touch(tmp_path, ["a.png"])
    assert "t.csv row 2: a may be a.jpg or a.png" in refused(table("image,label\na,0\nb,1\n"))
    assert Manifest.from_table(table("image,label\na.png,0\nb,1\n"))[0].image.name == "a.png"


def test_repeated_rows(table: Table) -> None:
    said = refused(table("image,label\na,0\nb,1\na.jpg,0\n"))
    assert "1 images are listed more than once; remove the repeats:\n  a: t.csv row 2, t.csv row 4" in said
    said = refused(table("image,label\na,0\nb,1\na.jpg,1\n"))
    assert "1 images have two different labels; decide which is right:\n  a: t.csv row 2, t.csv row 4" in said


def test_overlapping_splits(table: Table) -> None:
    said = refused(table("image,label,split\na,0,train\nb,1,train\n./a,0,test\n"))
    assert "1 images are in two splits; keep each in one:\n  a: t.csv row 2, t.csv row 4" in said
    said = refused(table("image,label,split,patient\na,0,train,SECRET\nb,1,test,SECRET\nc,0,train,\nd,1,test,\n"))
    assert "1 patients are in more than one split" in said
    assert "t.csv row 2 (train), t.csv row 3 (test)" in said
    assert "SECRET" not in said


# Class folders


def test_class_folders(tmp_path: Path) -> None:
    touch(
        tmp_path, ["10/a.jpg", "2/b.PNG", "2/deep/c.tif", "2/notes.txt", ".git/x.jpg", "__MACOSX/y.jpg", "2/.hid.jpg"]
    )
    read = Manifest.from_folder(tmp_path)
    assert read.classes == ("2", "10")
    assert [(record.name, record.label) for record in read] == [("2/b.PNG", 0), ("2/deep/c.tif", 0), ("10/a.jpg", 1)]
    assert read.splits == ()
    assert "1 files that are no images were left aside" in read.notes


def test_retfound_layout(tmp_path: Path) -> None:
    names = ["a_noDR", "b_mildDR", "c_moderateDR", "d_severeDR", "e_proDR"]
    touch(tmp_path, [f"{split}/{name}/{split}.jpg" for split in ("train", "val", "test") for name in names])
    read = Manifest.from_folder(tmp_path)
    assert read.classes == tuple(names)
    assert read.splits == ("train", "val", "test")
    assert read.select("val").class_counts() == (1, 1, 1, 1, 1)
    assert read[0].row == "train/a_noDR/train.jpg"


def test_folder_order_can_be_given_and_is_enforced(tmp_path: Path) -> None:
    touch(tmp_path, ["well/a.jpg", "sick/b.jpg"])
    assert Manifest.from_folder(tmp_path).classes == ("sick", "well")
    by_name = {record.name: record.label for record in Manifest.from_folder(tmp_path, classes=("well", "sick"))}
    assert by_name == {"well/a.jpg": 0, "sick/b.jpg": 1}
    with pytest.raises(DataError, match="the folders sick are none of the classes well, ill"):
        Manifest.from_folder(tmp_path, classes=("well", "ill"))


def test_plain_folder(tmp_path: Path) -> None:
    touch(tmp_path, ["a.jpg", "b.png", "t.csv"])
    read = Manifest.from_folder(tmp_path, classes=("x", "y"), labels_required=False)
    assert ([record.name for record in read], read.labels, read.classes) == (
        ["a.jpg", "b.png"],
        (None, None),
        ("x", "y"),
    )
    with pytest.raises(DataError, match=r"no class folders.*\n  t.csv"):
        Manifest.from_folder(tmp_path)


@pytest.mark.parametrize(("files", "said"), [([], "no images in it"), (["a/x.txt"], "no images in its class")])
def test_empty_folders(tmp_path: Path, files: list[str], said: str) -> None:
    touch(tmp_path, files)
    with pytest.raises(DataError, match=said):
        Manifest.from_folder(tmp_path)
    with pytest.raises(DataError, match="no folder at"):
        Manifest.from_folder(tmp_path / "nowhere")


# The manifest itself


def test_open_manifest_tells_tables_from_folders(table: Table, tmp_path: Path) -> None:
    config = DataConfig(table=str(table("photo,grade\na,1\nb,0\n")), image_column="photo", classes=("no", "yes"))
    assert open_manifest(config).classes == ("no", "yes")
    assert open_manifest(config, classes=("x", "y")).classes == ("x", "y")
    touch(tmp_path / "f", ["u/a.jpg", "v/b.jpg"])
    assert open_manifest(DataConfig(table=str(tmp_path / "f"))).classes == ("u", "v")


def test_counts_weights_and_selection() -> None:
    made = manifest(records([0, 0, 0, 1, None]), classes=3)
    assert made.class_counts() == (3, 1, 0)
    assert made.class_weights() == pytest.approx((4 / 6, 2.0, 0.0))
    assert sum(w * n for w, n in zip(made.class_weights(), made.class_counts(), strict=True)) == pytest.approx(4)
    with pytest.raises(DataError, match="has no val images"):
        made.select("val")


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        ([0, 0, 0], 2, "has the label '0'. Training needs two classes"),
        ([0, 2, 2], 3, "no image to train on has the label 1.\n?.*Labels seen: 0, 2"),
        ([0, 1, None], 2, "1 images to train on have no label:\n  t.csv row 4"),
        ([], 2, "has no train images"),
    ],
)
def test_what_cannot_be_trained_on(labels: list[int | None], classes: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        manifest(records(labels), classes=classes).check_trainable()


def test_a_record_is_plain_data() -> None:
    record = Record(image=Path("a.jpg"), label=1, name="a", row="t.csv row 2", extra={"age": "40"})
    assert json.loads(json.dumps(dict(record.extra))) == {"age": "40"}
    assert "40" not in repr(record)
