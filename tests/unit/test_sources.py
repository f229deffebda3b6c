"""Data sets as people have them: three formats, usual layouts, and everything that is wrong in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gai_yolo.data.index import Index
from gai_yolo.data.sources import load_index, load_indexes
from gai_yolo.errors import DataError
from gai_yolo.sections import DataConfig, SplitConfig

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="../shared/data/bccd is not there")
WIDTH, HEIGHT = 40, 30


def write_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 150)).save(path)


def good_json() -> dict[str, Any]:
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in (3, 1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 90, "bbox": [2, 3, 10, 12], "area": 77.5, "iscrowd": 1},
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [5.5, 6, 4, 4], "area": 16.0, "iscrowd": 0},
            {"id": 3, "image_id": 3, "category_id": 44, "bbox": [0, 0, 40, 30]},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 7, "name": "train"}, {"id": 44, "name": "bottle"}],
    }


def write_coco(root: Path, content: Any, split: str = "train") -> DataConfig:
    for number in (1, 2, 3):
        write_image(root / "images" / split / f"{number}.jpg")
    (root / "annotations").mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "annotations" / f"{split}.json").write_text(text, encoding="utf-8")
    return DataConfig(path=root)


def counted(index: Index) -> dict[tuple[str, str], int]:
    return {(problem.kind, problem.action): problem.count for problem in index.problems}


def boxes_by_file(index: Index) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    names = index.class_names
    return {
        image.path.name: sorted((names[c], tuple(map(float, b))) for c, b in zip(image.classes, image.boxes, strict=True))
        for image in index.images
    }


def test_sparse_ids_crowds_areas_and_background_images_survive(tmp_path: Path) -> None:
    """Loss prevented: COCO's 80 classes numbered up to 91 training 91 outputs, or evaluation scored against wrong areas."""
    index = load_index(write_coco(tmp_path, good_json()), "train")
    assert [(c.id, c.name) for c in index.categories] == [(7, "train"), (44, "bottle"), (90, "toothbrush")]
    assert [image.image_id for image in index.images] == [1, 2, 3]
    first, second, third = index.images
    assert first.classes.tolist() == [2, 0]
    assert first.crowd.tolist() == [True, False]
    assert first.areas.tolist() == [77.5, 16.0]
    assert first.boxes.tolist() == [[2, 3, 12, 15], [5.5, 6, 9.5, 10]]
    assert second.boxes.shape == (0, 4)
    assert third.areas.tolist() == [WIDTH * HEIGHT]
    assert (third.width, third.height) == (WIDTH, HEIGHT)
    assert index.problems == ()


Change = Callable[[dict[str, Any]], object]


def set_box(value: Any) -> Change:
    return lambda c: c["annotations"][1].update(bbox=value)


COUNTED: dict[str, tuple[Change, str, str, int]] = {
    "text bbox": (set_box("5,6,4,4"), "malformed annotation", "skipped", 2),
    "three numbers": (set_box([5, 6, 4]), "malformed annotation", "skipped", 2),
    "text in bbox": (set_box([5, 6, 4, "4"]), "malformed annotation", "skipped", 2),
    "missing bbox": (lambda c: c["annotations"][1].pop("bbox"), "malformed annotation", "skipped", 2),
    "missing image id": (lambda c: c["annotations"][1].pop("image_id"), "malformed annotation", "skipped", 2),
    "list as category id": (lambda c: c["annotations"][1].update(category_id=[7]), "malformed annotation", "skipped", 2),
    "annotation is a number": (lambda c: c["annotations"].append(5), "malformed annotation", "skipped", 3),
    "crowd is a text": (lambda c: c["annotations"][1].update(iscrowd="no"), "malformed annotation", "skipped", 2),
    "not a number": (set_box([5, float("nan"), 4, 4]), "box with a number that is not finite", "skipped", 2),
    "overflowing number": (set_box([10**400, 6, 4, 4]), "box with a number that is not finite", "skipped", 2),
    "no width": (set_box([5, 6, 0, 4]), "box without area", "skipped", 2),
    "negative height": (set_box([5, 6, 4, -4]), "box without area", "skipped", 2),
    "wholly outside": (set_box([50, 6, 4, 4]), "box without area", "skipped", 2),
    "partly outside": (set_box([35, 6, 10, 4]), "box outside the image", "clipped", 3),
    "unknown category": (lambda c: c["annotations"][1].update(category_id=8), "box of an unknown class", "skipped", 2),
    "unknown image": (lambda c: c["annotations"][1].update(image_id=77), "annotation of an unknown image", "skipped", 2),
    "annotation id twice": (lambda c: c["annotations"][1].update(id=1), "duplicate annotation id", "second skipped", 2),
    "other size": (lambda c: c["images"][1].update(width=400), "image size differs from the annotation", "real size used", 3),
}


@pytest.mark.parametrize("case", COUNTED)
def test_wrong_annotation_is_counted_and_the_rest_is_kept(case: str, tmp_path: Path) -> None:
    """Loss prevented: one bad record ends a job of days, or passes into training unseen."""
    change, kind, action, num_boxes = COUNTED[case]
    content = good_json()
    change(content)
    index = load_index(write_coco(tmp_path, content), "train")
    assert counted(index) == {(kind, action): 1}
    assert "train.json" in index.problems[0].example or ".jpg" in index.problems[0].example
    assert sum(len(image.boxes) for image in index.images) == num_boxes
    boxes = np.concatenate([image.boxes for image in index.images])
    assert np.isfinite(boxes).all()
    assert (boxes >= 0).all()
    assert (boxes <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()


def replace(**values: Any) -> Change:
    return lambda c: c.update(values)


REFUSED: dict[str, tuple[Change, str]] = {
    "images missing": (lambda c: c.pop("images"), "`images` is missing"),
    "annotations is a dict": (replace(annotations={}), "`annotations` is a dict"),
    "no images": (replace(images=[], annotations=[]), "the split has no images"),
    "no categories": (replace(categories=[]), "categories is empty"),
    "no boxes": (replace(annotations=[]), "none of the 3 training images has a usable box"),
    "only bad boxes": (lambda c: [a.update(bbox="x") for a in c["annotations"]], r"3 x malformed annotation.*annotation 1"),
    "image without id": (lambda c: c["images"][1].pop("id"), r"images\[1\] needs a whole number `id`"),
    "image id is text": (lambda c: c["images"][2].update(id="2"), r"images\[2\] needs a whole number `id`"),
    "image id beyond 64 bits": (lambda c: c["images"][2].update(id=2**63), r"images\[2\] needs a whole number `id`"),
    "image is a text": (lambda c: c["images"].insert(0, "1.jpg"), r"images\[0\] needs"),
    "file name is half a character": (lambda c: c["images"][0].update(file_name="\ud800.jpg"), r"images\[0\] needs"),
    "image id twice": (lambda c: c["images"][1].update(id=3), "image id 3 occurs twice"),
    "category id twice": (lambda c: c["categories"][0].update(id=7), "category id 7 occurs twice"),
    "category without name": (lambda c: c["categories"][2].pop("name"), r"categories\[2\] needs"),
    "name leads up": (lambda c: c["images"][0].update(file_name="../val/3.jpg"), "image 3: the file name '../val/3.jpg' leads out of"),
    "name leads up inside": (lambda c: c["images"][0].update(file_name="a/../../3.jpg"), "leads out of"),
    "name leads up with backslashes": (lambda c: c["images"][0].update(file_name="..\\3.jpg"), "leads out of"),
    "absolute name": (lambda c: c["images"][0].update(file_name="/etc/passwd"), "'/etc/passwd' leads out of"),
    "name with a zero byte": (lambda c: c["images"][0].update(file_name="a\0b/3.jpg"), "leads out of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_json_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    """Loss prevented: a traceback that names our code instead of the user's record, or files read from outside the data set."""
    change, message = REFUSED[case]
    content = good_json()
    change(content)
    with pytest.raises(DataError, match=message):
        load_index(write_coco(tmp_path, content), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "annotations": [', "train.json, line 2, column 18: not valid JSON"),
        ("[]", "this is a list"),
        ("[" * 100_000, "not usable JSON"),
        ('{"images": ' + "9" * 5000 + "}", "not usable JSON"),
        ("", "line 1, column 1"),
    ],
)
def test_damaged_json_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    """Loss prevented: a download that broke off found by bisecting a file of 450 MB."""
    with pytest.raises(DataError, match=message):
        load_index(write_coco(tmp_path, text), "train")


def test_json_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """Loss prevented: a decoding traceback for an archive that was not unpacked."""
    config = write_coco(tmp_path, good_json())
    (tmp_path / "annotations" / "train.json").write_bytes(b"\x1f\x8b\x08\xff")
    with pytest.raises(DataError, match=r"train\.json: the COCO json is not UTF-8"):
        load_index(config, "train")


def test_linked_folder_may_not_lead_outside_but_linked_files_may(tmp_path: Path) -> None:
    """Loss prevented: an annotation file reading foreign folders through a link, or link farms (DVC) that do not train."""
    outside = tmp_path / "outside"
    write_image(outside / "9.jpg")
    content = good_json()
    content["images"][0]["file_name"] = "link/9.jpg"
    config = write_coco(tmp_path / "set", content)
    images = tmp_path / "set" / "images" / "train"
    (images / "link").symlink_to(outside)
    with pytest.raises(DataError, match=r"'link/9\.jpg' leads out of"):
        load_index(config, "train")
    (images / "link").unlink()
    (images / "link").mkdir()
    (images / "link" / "9.jpg").symlink_to(outside / "9.jpg")
    assert len(load_index(config, "train")) == 3


def test_few_bad_images_are_skipped_and_many_are_refused(tmp_path: Path) -> None:
    """Loss prevented: training on the tenth of a data set that a full disk left over."""
    content = good_json()
    write_coco(tmp_path, content)
    (tmp_path / "images" / "train" / "2.jpg").unlink()
    (tmp_path / "images" / "train" / "3.jpg").write_bytes(b"not an image")
    index = load_index(DataConfig(path=tmp_path, max_bad_fraction=0.7), "train")
    assert counted(index) == {("image file missing", "image skipped"): 1, ("image unreadable", "image skipped"): 1}
    assert [image.image_id for image in index.images] == [1]
    with pytest.raises(DataError, match=r"2 of 3 images are missing or unreadable.*max_bad_fraction = 0.1.*2\.jpg"):
        load_index(DataConfig(path=tmp_path), "train")
    shutil.rmtree(tmp_path / "images" / "train")
    (tmp_path / "images" / "train").mkdir()
    with pytest.raises(DataError, match="3 of 3 images"):
        load_index(DataConfig(path=tmp_path, max_bad_fraction=1.0), "train")


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/{}.json", "images/{}"),
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("annotations/instances_{}2014.json", "{}2014"),
        ("annotations/{}.json", "images"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_usual_coco_layouts_are_found(annotations: str, images: str, split: str, tmp_path: Path) -> None:
    """Loss prevented: an hour of renaming folders before the first training."""
    name = "valid" if split == "val" and "coco" in annotations else split
    source = tmp_path / annotations.format(name)
    source.parent.mkdir(parents=True)
    source.write_text(json.dumps(good_json()))
    for number in (1, 2, 3):
        write_image(tmp_path / images.format(name) / f"{number}.jpg")
    (tmp_path / "images" / "elsewhere").mkdir(parents=True, exist_ok=True)
    index = load_index(DataConfig(path=tmp_path), "train" if split == "train" else "val")
    assert len(index) == 3
    assert index.problems == ()


def test_configured_places_win_and_wrong_ones_are_named(tmp_path: Path) -> None:
    """Loss prevented: the usual file trained on although another one was asked for."""
    write_coco(tmp_path, good_json())
    other = good_json()
    other["annotations"] = other["annotations"][1:2]
    (tmp_path / "my.json").write_text(json.dumps(other))
    place = SplitConfig(annotations=Path("my.json"), images=Path("images/train"))
    index = load_index(DataConfig(path=tmp_path, train=place), "train")
    assert sum(len(image.boxes) for image in index.images) == 1
    for wrong, message in (
        (SplitConfig(annotations=Path("no.json")), r"no\.json: no such file; correct data\.train\.annotations"),
        (SplitConfig(images=Path("nowhere")), r"nowhere: no such folder; correct data\.train\.images"),
    ):
        with pytest.raises(DataError, match=message):
            load_index(DataConfig(path=tmp_path, train=wrong), "train")


def test_two_candidates_for_a_split_are_refused(tmp_path: Path) -> None:
    """Loss prevented: train2014 taken silently where train2017 was meant."""
    (tmp_path / "annotations").mkdir()
    for year in (2014, 2017):
        (tmp_path / "annotations" / f"instances_train{year}.json").write_text("{}")
    with pytest.raises(DataError, match=r"instances_train2014\.json, instances_train2017\.json.*set data\.train\.annotations"):
        load_index(DataConfig(path=tmp_path), "train")


def test_splits_with_different_classes_are_refused(tmp_path: Path) -> None:
    """Loss prevented: a model evaluated against shifted class numbers, with an mAP near zero and no word why."""
    write_coco(tmp_path, good_json())
    other = good_json()
    other["categories"][1]["name"] = "tram"
    config = write_coco(tmp_path, other, "val")
    with pytest.raises(DataError, match="only in train: 7 'train'; only in val: 7 'tram'"):
        load_indexes(config)
    write_coco(tmp_path, good_json(), "val")
    train, val = load_indexes(config)
    assert train.categories == val.categories


def test_missing_split_and_missing_data_set_say_where_was_looked(tmp_path: Path) -> None:
    """Loss prevented: guessing what the program expects."""
    with pytest.raises(DataError, match=r"found no COCO json of the val split.*set data\.val\.annotations"):
        load_index(write_coco(tmp_path / "coco", good_json()), "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: found no data set there; looked for COCO .* YOLO .* VOC"):
        load_index(DataConfig(path=tmp_path / "empty"), "train")
    with pytest.raises(DataError, match="there is no such folder or file"):
        load_index(DataConfig(path=tmp_path / "absent"), "train")
    with pytest.raises(DataError, match="found no YOLO description"):
        load_index(DataConfig(path=tmp_path / "empty", format="yolo"), "train")
    with pytest.raises(DataError, match="VOC"):
        load_index(DataConfig(path=tmp_path / "empty", format="voc"), "train")
    write_image(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="give the data set's folder"):
        load_index(DataConfig(path=tmp_path / "a.jpg"), "train")


@pytest.fixture(scope="module")
def bccd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Index, Index]]:
    if not BCCD.is_dir():
        pytest.skip("../shared/data/bccd is not there")
    description = tmp_path_factory.mktemp("bccd") / "data.yaml"
    description.write_text(f"path: {json.dumps(str(BCCD))}\ntrain: images/train\nval: images/val\nnc: 3\nnames: [RBC, WBC, Platelets]\n")
    return {
        "auto": load_indexes(DataConfig(path=BCCD)),
        "coco": load_indexes(DataConfig(path=BCCD, format="coco")),
        "yolo": load_indexes(DataConfig(path=description)),
        "voc": load_indexes(DataConfig(path=BCCD, format="voc")),
    }


@needs_bccd
def test_three_forms_of_real_data_are_one_data_set(bccd: dict[str, tuple[Index, Index]]) -> None:
    """Loss prevented: results that depend on the form in which the same photographs were annotated."""
    for split, num_images, num_boxes in ((0, 205, 2804), (1, 87, 1137)):
        reference = boxes_by_file(bccd["coco"][split])
        for form in ("coco", "yolo", "voc"):
            found = boxes_by_file(bccd[form][split])
            assert len(found) == num_images
            assert sum(map(len, found.values())) == num_boxes
            assert found.keys() == reference.keys()
            for name, boxes in found.items():
                # YOLO's six decimals are worth a thousandth of a pixel, which may swap boxes in the sorted list.
                ours, theirs = ([(c, *np.round(np.asarray(b), 1)) for c, b in these] for these in (boxes, reference[name]))
                assert sorted(ours) == sorted(theirs), (form, name)
    assert bccd["auto"][0].digest() == bccd["coco"][0].digest()


@needs_bccd
def test_degenerate_boxes_of_real_data_are_told(bccd: dict[str, tuple[Index, Index]]) -> None:
    """Loss prevented: boxes with xmin = xmax turning into NaN losses."""
    for split, name in ((0, "BloodImage_00343.xml"), (1, "BloodImage_00338.xml")):
        assert counted(bccd["voc"][split]) == {("box without area", "skipped"): 1}
        assert name in bccd["voc"][split].problems[0].example
        assert bccd["coco"][split].problems == bccd["yolo"][split].problems == ()


def test_built_in_data_set_is_named_by_a_word(tmp_path: Path) -> None:
    """Loss prevented: the first training of a newcomer failing for want of data."""
    config = DataConfig(path=Path("shapes"), cache_folder=tmp_path)
    train, val = load_indexes(config)
    assert train.class_names == ["circle", "triangle", "square", "star"]
    assert len(train) > len(val) > 0
    assert train.problems == val.problems == ()
    with pytest.raises(DataError, match="is COCO, not voc"):
        load_index(config.model_copy(update={"format": "voc"}), "train")
