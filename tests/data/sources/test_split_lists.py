"""DomainNet and NICO++ as they lie on disk, with what can be wrong in their lists."""

import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Image

from fedra_engine.config import DataConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.samples import prepare
from fedra_engine.data.sources import load_source
from fedra_engine.runtime.errors import InputError
from tests.data.trees import DOMAINNET, NICOPP, make_domainnet, make_nicopp

CLASSES = ["aircraft_carrier", "alarm_clock", "ambulance"]


@pytest.fixture
def domainnet(tmp_path: Path) -> Path:
    return make_domainnet(tmp_path / "DomainNet", CLASSES)


def load(root: Path, source: str = "domainnet", **settings: object) -> DomainData:
    return load_source(DataConfig(source, str(root), **settings), seed=0)


def paths(data: DomainData) -> list[str]:
    return [image["path"] for image in data.content.cast_column("image", Image(decode=False))["image"]]


def edit(root: Path, name: str, change) -> None:
    file = root / "splits" / f"{name}.txt"
    file.write_bytes(change(file.read_bytes()))


def test_domainnet_is_what_its_lists_say(domainnet: Path) -> None:
    data = load(domainnet)
    assert data.domains == DOMAINNET
    assert data.classes == CLASSES
    assert (len(data.train), len(data.test)) == (6 * 3 * 6, 6 * 3 * 2)
    for path, domain, label in zip(paths(data), data.domain_of, data.labels, strict=True):
        assert path.startswith(f"{domainnet}/{DOMAINNET[domain]}/{CLASSES[label]}/")
    listed = (domainnet / "splits" / "sketch_test.txt").read_text().split("\n")
    found = paths(data.test.select(np.flatnonzero(data.test.domain_of == 5)))
    assert [f"{domainnet}/{line.split()[0]}" for line in listed if line] == found


def test_nicopp_paths_may_have_spaces(tmp_path: Path) -> None:
    classes = ["bear", "fishing rod", "hot air balloon"]
    root = make_nicopp(tmp_path / "NICO ++", classes)
    data = load(root, "nicopp")
    assert data.domains == NICOPP
    assert data.classes == classes
    assert all(Path(path).is_file() for path in paths(data))
    assert any("/hot air balloon/" in path for path in paths(data))


def test_the_first_classes_can_be_kept(domainnet: Path) -> None:
    data = load(domainnet, classes=2, domains=["real", "clipart"])
    assert data.domains == ["real", "clipart"]
    assert data.classes == CLASSES[:2]
    assert set(data.labels) == {0, 1}
    assert load(domainnet, classes=100).classes == CLASSES


def test_a_class_that_a_domain_lacks_keeps_the_labels_of_the_others(domainnet: Path) -> None:
    for split in ("train", "test"):
        edit(
            domainnet,
            f"painting_{split}",
            lambda text: b"".join(x for x in text.splitlines(True) if b"/alarm_clock/" not in x),
        )
    data = load(domainnet)
    assert data.classes == CLASSES
    assert set(data.labels[data.domain_of == DOMAINNET.index("painting")]) == {0, 2}
    assert load(domainnet, domains=["painting"]).classes == ["aircraft_carrier", "class 1", "ambulance"]


def test_line_ends_blank_lines_and_repeated_lines_change_nothing(domainnet: Path) -> None:
    before = load(domainnet)
    edit(domainnet, "real_train", lambda text: text.replace(b"\n", b"\r\n") + b"\r\n" + text.splitlines(True)[0])
    data = load(domainnet)
    assert paths(data) == paths(before)
    assert data.labels.tolist() == before.labels.tolist()
    assert data.notes == [f"{domainnet}/splits/real_train.txt: 1 of its lines repeat another and count once"]


def test_a_signature_and_paths_written_otherwise_change_nothing(domainnet: Path) -> None:
    before = load(domainnet)
    edit(domainnet, "real_train", lambda text: b"\xef\xbb\xbf" + text.replace(b" ", b"\t"))
    edit(domainnet, "real_train", lambda text: text.replace(b"real/", b"./real//"))
    data = load(domainnet)
    assert paths(data) == paths(before)
    assert data.notes == []
    edit(domainnet, "real_train", lambda text: text + text.splitlines(True)[1].replace(b"./real//", b"real/"))
    assert len(load(domainnet).notes) == 1


def test_hidden_files_do_not_count(domainnet: Path) -> None:
    before = load(domainnet)
    edit(domainnet, "real_train", lambda text: text + b"real/.DS_Store 0\nreal/aircraft_carrier/._real_001.jpg 0\n")
    data = load(domainnet)
    assert paths(data) == paths(before)
    assert data.classes == before.classes
    assert data.notes == [f"{domainnet}/splits/real_train.txt: 2 of its lines name hidden files, which do not count"]


def test_an_image_in_two_lists_is_said(domainnet: Path) -> None:
    test_lines = (domainnet / "splits" / "real_test.txt").read_bytes().splitlines(True)
    edit(domainnet, "real_train", lambda text: text + b"".join(test_lines[:2]))
    data = load(domainnet)
    assert data.notes == [f"{domainnet}/splits: 2 images are in several of the lists, and in several parts of the data"]


def test_domains_are_those_with_lists_and_no_path_leaves_their_folder(domainnet: Path) -> None:
    outside = domainnet / "real_outside"
    for split in ("train", "test"):
        (outside.parent / f"{outside.name}_{split}.txt").write_bytes(
            (domainnet / "splits" / f"real_{split}.txt").read_bytes()
        )
    for domain in (f"../{outside.name}", str(outside), "", "."):
        with pytest.raises(InputError, match=rf"data\.domains: found '{domain}', expected some of those in .*/splits"):
            load(domainnet, domains=[domain])


def test_lists_of_no_domain_are_said(domainnet: Path) -> None:
    (domainnet / "splits" / "real_val.txt").write_text("")
    (domainnet / "splits" / "extra_test.txt").write_text("")
    (note,) = load(domainnet).notes
    assert "splits: left out 2 .txt: extra_test.txt, real_val.txt; expected <domain>_train.txt and" in note


def test_a_pipe_is_no_list(domainnet: Path) -> None:
    (domainnet / "splits" / "real_test.txt").unlink()
    os.mkfifo(domainnet / "splits" / "real_test.txt")
    with pytest.raises(InputError, match=r"data\.root: cannot read .*real_test\.txt: it is no regular file; expected"):
        load(domainnet)


LINE = b"real/aircraft_carrier/real_001_000000.jpg"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE, r"real_train\.txt, line 3: found '.*jpg', expected a path, a space and a label"),
        (LINE + b" three", r"real_train\.txt, line 3: found '.*three', expected a path, a space and a label"),
        (LINE + b" 345", r"real_train\.txt, line 3: found label 345, expected one from 0 to 344"),
        (LINE + b" " + b"1" * 5000, r"real_train\.txt, line 3: .*expected a path, a space and a label"),
        (b"real/aircraft_carrier/\0.jpg 0", r"real_train\.txt, line 3: found a NUL character, expected utf-8 text"),
        (b"/" + LINE + b" 0", r"real_train\.txt, line 3: found '/real.*', expected a path that stays below data\.root"),
        (b"real/../" + LINE + b" 0", r"real_train\.txt, line 3: found 'real/\.\..*', expected a path that stays below"),
        (LINE + b" -1", r"real_train\.txt, line 3: found label -1, expected one from 0 to 344"),
        (LINE + b" 2", r"real_train\.txt, line 3: found label 2 for 'aircraft_carrier', .* 0 .*clipart_train\.txt, li"),
        (b"real/x/y.jpg 0", r"real_train\.txt, line 3: found .* for 'x', .*'aircraft_carrier' .*clipart_train\.txt, l"),
        (b"../x/aircraft_carrier/0.jpg 0", r"real_train\.txt, line 3: found '\.\./x/.*', expected a path that stays"),
        (b"real/aircraft_carrier/../0.jpg 0", r"real_train\.txt, line 3: found '.*', expected a path that stays"),
        (b"/aircraft_carrier/0.jpg 0", r"real_train\.txt, line 3: found '/.*', expected a path that stays below"),
    ],
)
def test_wrong_lines_are_reported_with_their_number(domainnet: Path, line: bytes, message: str) -> None:
    def put_third(text: bytes) -> bytes:
        lines = text.splitlines(True)
        return b"".join([*lines[:2], line + b"\n", *lines[2:]])

    edit(domainnet, "real_train", put_third)
    with pytest.raises(InputError, match=rf"^data\.root: .*/splits/{message}"):
        load(domainnet)


def test_lists_in_another_encoding_are_named_at_once(domainnet: Path) -> None:
    for name in ("real_train", "sketch_test"):
        edit(domainnet, name, lambda text: text + b"\xe9\xff 0\n")
    with pytest.raises(
        InputError, match=r"^data\.root: found no utf-8 text in .*/real_train\.txt \(line \d+\), .*/sketch_test\.txt \("
    ):
        load(domainnet)


def test_missing_lists_and_empty_domains_are_named(domainnet: Path, tmp_path: Path) -> None:
    edit(domainnet, "sketch_test", lambda text: b"")
    with pytest.raises(InputError, match=r"data\.root: found no test samples of domain 'sketch'"):
        load(domainnet)
    edit(domainnet, "sketch_train", lambda text: b"\n")
    with pytest.raises(InputError, match=r"data\.root: found no training samples of domain 'sketch'"):
        load(domainnet)
    (domainnet / "splits" / "sketch_test.txt").unlink()
    with pytest.raises(InputError, match=r"data\.root: cannot read .*/sketch_test\.txt: No such file"):
        load(domainnet)
    with pytest.raises(InputError, match=r"data\.domains: found 'comic', expected some of those in .*: \['clipart'"):
        load(domainnet, domains=["comic"])
    with pytest.raises(InputError, match=r"data\.root: found no lists in '.*nowhere/splits', expected <domain>_train"):
        load(tmp_path / "nowhere")
    for wrong in (domainnet / "splits", domainnet.parent):
        with pytest.raises(InputError, match=rf"found no lists in .* and _test\.txt \(did you mean '{domainnet}'\?\)$"):
            load(wrong)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:300])])
def test_images_that_are_missing_or_cut_short_are_reported_with_their_line(domainnet: Path, damage) -> None:
    data = load(domainnet)
    damage(domainnet / "real" / "alarm_clock" / "real_002_000003.jpg")
    config = DataConfig("domainnet", str(domainnet), image_size=8)
    model = type("Config", (), {"num_channels": 3})
    with pytest.raises(InputError, match=r"real_002_000003\.jpg \(.*/splits/real_train\.txt, line 10\): .*; expected"):
        prepare(data, config, str(domainnet), model)
