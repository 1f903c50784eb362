"""Copies are found whatever was done to them, eyes that only resemble each other are not, and no pair is overlooked."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyetune.data.audit import hashes
from eyetune.data.audit.copies import AGREE, Views, find_copies, register, turn
from eyetune.data.audit.hashes import (
    CROPS,
    FLIPS,
    KEPT,
    SIGNS,
    SIZE,
    Candidates,
    Components,
    Graph,
    candidates,
    exactly,
    frequencies,
)
from eyetune.data.audit.looks import SIDE, Look, Looker, look_at, view_of
from eyetune.data.cache import Cache
from eyetune.data.fundus import find_field
from eyetune.data.identical import join, same_bytes
from eyetune.data.phantom import sample


def photo(patient: int, eye: str = "R", camera: str = "clinic", size: int = 192) -> np.ndarray:
    return sample(4, patient, eye, camera, size).image


def view(image: np.ndarray) -> np.ndarray:
    image = np.ascontiguousarray(image)
    return view_of(image, find_field(image))


@pytest.fixture(scope="module")
def eyes() -> list[np.ndarray]:
    """Both eyes of eight patients."""
    return [photo(patient, eye) for patient in range(8) for eye in "RL"]


# -- the hash ----------------------------------------------------------------------------------------------------------


_SIZES = np.arange(1, SIZE + 1) ** -0.9


def crowd(count: int, seed: int = 0) -> np.ndarray:
    """Hashes of as many pictures that resemble each other: a few patterns make up most of all of them."""
    rng = np.random.default_rng(seed)
    sizes = _SIZES
    whole = rng.normal(size=(count, SIZE)) * sizes + 0.5 * sizes * (SIGNS == 1).all(axis=0)
    values = whole[:, None] + 0.05 * sizes * rng.normal(size=(count, len(CROPS), SIZE))
    return (values / np.linalg.norm(values, axis=2, keepdims=True)).astype(np.float32)


def with_copies(count: int, copies: int) -> np.ndarray:
    """A crowd, and noisy copies of the first of it, each flipped in another way and seen without other borders."""
    values = crowd(count)
    noise = np.random.default_rng(1).normal(size=(copies, SIZE)) * 0.2 / SIZE**0.5
    made = [(values[at, at % 3] + noise[at]) * SIGNS[at % len(FLIPS)] for at in range(copies)]
    made = np.repeat(np.stack(made)[:, None], len(CROPS), axis=1)
    made /= np.linalg.norm(made, axis=2, keepdims=True)
    return np.concatenate([values, made]).astype(np.float32)


def slow_pairs(values: np.ndarray, least: float) -> dict[tuple[int, int], float]:
    """Every picture, without its borders and flipped, against every other one, one after the other."""
    components = Components(values[:, 0])
    whole = components(values[:, 0])
    best: dict[tuple[int, int], float] = {}
    for first in range(len(values)):
        for crop in range(len(CROPS)):
            for flip in range(len(FLIPS)):
                seen = components(values[first, crop][None] * SIGNS[flip])[0]
                for second in range(len(values)):
                    pair, like = (min(first, second), max(first, second)), float(seen @ whole[second])
                    if first != second and like >= least:
                        best[pair] = max(like, best.get(pair, -1))
    return best


def liked(found: Candidates) -> dict[tuple[int, int], float]:
    """Pairs, each once, and their likeness."""
    pairs = list(zip(found.first.tolist(), found.second.tolist(), found.likeness.tolist(), strict=True))
    best = {(min(i, j), max(i, j)): like for i, j, like in pairs}
    assert len(best) == len(pairs)
    return best


@given(st.integers(2, 14), st.integers(1, 6))
@settings(max_examples=5, deadline=None)
def test_the_search_finds_what_comparing_everything_finds(count: int, copies: int) -> None:
    values = with_copies(count, min(count, copies))
    slow = slow_pairs(values, 0.6)
    for exact in (0, 10**6):
        assert liked(candidates(values, 0.6, most=len(values), exact=exact)) == pytest.approx(slow, abs=1e-4)


def test_components_are_of_one_size_and_a_flip_changes_signs_only() -> None:
    values = crowd(4000)[:, 0]
    components = Components(values)
    assert components.basis.shape == (SIZE, KEPT)
    for flip in range(len(FLIPS)):
        assert np.allclose(components(values * SIGNS[flip]), components(values) * components.signs[flip], atol=1e-5)
    seen = values @ components.basis
    second = (seen**2).mean(axis=0)
    assert second.min() > 0.3  # not quite 1, for what is not known of weak components counts as size
    assert second.max() <= 1
    for parity in np.unique(components.signs, axis=1).T:
        part = seen[:, (parity == components.signs.T).all(axis=1)]
        moments = part.T @ part / len(part)
        assert np.abs(moments - np.diag(np.diag(moments))).max() < 1e-3


def test_copies_stand_out_in_the_components_where_strangers_are_alike_without() -> None:
    """The reason for them: raw hashes of strangers are nearly as alike as those of copies."""
    values = with_copies(600, 60)
    components = Components(values[:, 0])
    gaps = []
    for see, signs in ((components, components.signs), (np.asarray, SIGNS)):
        whole = see(values[:, 0])
        copies = [(whole[600 + at] * signs[at % len(FLIPS)]) @ see(values[at : at + 1, at % 3])[0] for at in range(60)]
        strangers = (whole[:600] @ whole[:600].T)[np.triu_indices(600, 1)]
        gaps.append(min(copies) - np.quantile(strangers, 0.999))
    assert gaps[0] > 0.25
    assert gaps[1] < 0.1


def test_the_graph_answers_as_comparing_all_with_all_does() -> None:
    members = Components(crowd(3000)[:, 0])(crowd(3000)[:, 0])
    known, like = exactly(members, members[:300], 9)
    found, nearly = Graph(members, 1).nearest(members[:300], 9)
    assert np.mean([len(set(one) & set(other)) / 9 for one, other in zip(known, found, strict=True)]) > 0.97
    assert nearly.max(axis=1) == pytest.approx(like.max(axis=1), abs=1e-5)
    again = Graph(members, 3).nearest(members[:300], 9)
    assert np.array_equal(found, again[0])  # whatever the number of threads
    assert np.array_equal(nearly, again[1])


def test_copies_in_a_crowd_are_found_in_the_graph() -> None:
    values = with_copies(2500, 200)
    assert len(values) > hashes.EXACT  # so that the graph is what is asked
    found = candidates(values)
    best = {(min(i, j), max(i, j)): flip for i, j, flip in zip(*(c.tolist() for c in found[:3]), strict=True)}
    assert np.mean([best.get((at, 2500 + at)) == at % len(FLIPS) for at in range(200)]) >= 0.995
    assert len(found.first) < 8 * len(values)


def test_equal_pictures_in_a_row_make_no_islands() -> None:
    """A graph built in the order of the table would hold some groups of equal pictures that nothing leads to."""
    members = Components(crowd(3000)[:, 0])(np.repeat(crowd(60)[:, 0], 50, axis=0))
    _, like = Graph(members, 1).nearest(members, 9)
    assert (like.max(axis=1) > 0.999).mean() > 0.995


@pytest.mark.parametrize("flip", range(len(FLIPS)))
def test_the_hash_of_a_flipped_view_is_the_hash_with_other_signs(eyes: list[np.ndarray], flip: int) -> None:
    for image in eyes[:4]:
        seen = view(image)
        turned = frequencies(np.ascontiguousarray(turn(seen, flip)))
        assert np.abs(frequencies(seen) * SIGNS[flip] - turned).max() < 5e-3  # rounding is not symmetric


def test_the_hash_of_a_cut_view_is_that_of_the_cropped_photograph(eyes: list[np.ndarray]) -> None:
    seen = eyes[0][:, :, 1]
    seen = cv2.resize(seen, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    border = round(CROPS[2] * SIDE)
    cropped = cv2.resize(seen[border:-border, border:-border], (SIDE, SIDE))
    whole, part = frequencies(seen), frequencies(cropped)
    assert int(np.argmax(whole @ part[0])) == 2
    assert whole[2] @ part[0] > 0.95 > whole[0] @ part[0]


def test_candidates_come_once_in_the_way_that_fits_best(eyes: list[np.ndarray]) -> None:
    views = [view(image) for image in eyes]
    views += [view(eyes[3][:, ::-1]), view(eyes[5])]
    found = candidates(np.stack([frequencies(one) for one in views]))
    pairs = [(min(i, j), max(i, j)) for i, j in zip(found.first.tolist(), found.second.tolist(), strict=True)]
    assert len(pairs) == len(set(pairs))
    best = {pair: (FLIPS[f], like) for pair, f, like in zip(pairs, found.flip, found.likeness, strict=True)}
    assert best[3, len(eyes)][0] == "left to right"
    assert best[5, len(eyes) + 1] == ("", pytest.approx(1, abs=1e-5))


def test_a_picture_has_no_more_pairs_than_it_may(eyes: list[np.ndarray]) -> None:
    """Forty times one eye: 780 pairs all alike, of which the number kept grows with the number of pictures."""
    values = np.repeat(frequencies(view(eyes[0]))[None], 40, axis=0)
    found = candidates(values, most=3)
    assert 40 <= len(found.first) <= 2 * 3 * 40
    groups = join(40, zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert sum(map(len, groups)) == 40


def test_blocks_bound_memory_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = with_copies(30, 20)
    whole = candidates(values)
    monkeypatch.setattr(hashes, "_BLOCK", 7)
    assert liked(candidates(values)) == pytest.approx(liked(whole), abs=1e-5)


# -- registration ------------------------------------------------------------------------------------------------------


def agreement(one: np.ndarray, other: np.ndarray, flip: int = 0, crop: int = 0) -> float:
    return register(Views({0: view(one), 1: view(other)}), 0, 1, flip, crop).agreement


def test_altered_copies_agree_and_different_eyes_do_not(eyes: list[np.ndarray]) -> None:
    small = cv2.resize(eyes[0], (96, 96), interpolation=cv2.INTER_AREA)
    brighter = np.clip(eyes[0].astype(float) * 1.3 + 10 * (eyes[0] > 20), 0, 255).astype(np.uint8)
    for copy in (small, brighter, eyes[0][8:-8, 8:-8], eyes[0][:, 10:]):
        assert agreement(eyes[0], copy) > 0.93
    for other in eyes[1:]:
        for flip in range(4):
            assert agreement(eyes[0], other, flip) < 0.75


def test_blank_and_noise_agree_with_nothing(eyes: list[np.ndarray]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, eyes[0].shape).astype(np.uint8)
    for other in (np.zeros_like(noise), np.full_like(noise, 90), noise):
        assert agreement(eyes[0], other) < 0.5
        assert agreement(other, eyes[0]) < 0.5


def test_scale_says_that_borders_were_cropped(eyes: list[np.ndarray]) -> None:
    views = Views({0: view(eyes[0]), 1: view(eyes[0][12:-12, 12:-12])})
    larger = find_field(eyes[0]).width / 168  # the field of view fills a view; that of the copy is cut to 168 pixels
    assert register(views, 0, 1, 0, 1).scale == pytest.approx(larger, abs=0.02)
    assert register(views, 1, 0, 0, 0).scale == pytest.approx(1 / larger, abs=0.02)


# -- files -------------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, image: np.ndarray, quality: int = 92) -> Path:
    path = folder / name
    assert cv2.imwrite(str(path), np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return path


def links_of(paths: list[Path], cache: Cache | None = None) -> list[tuple[str, str, str, str]]:
    seen = Looker(cache).all(paths, 2)
    looks = {at: one.look for at, one in enumerate(seen) if one.look is not None}
    found = find_copies(paths, looks, [one.digest for one in seen], 2)
    return sorted((paths[one.first].name, paths[one.second].name, one.kind, one.how) for one in found)


def test_every_kind_of_copy_is_named(tmp_path: Path, eyes: list[np.ndarray]) -> None:
    paths = [write(tmp_path, f"{at:02}.jpg", image) for at, image in enumerate(eyes)]
    stored = cv2.imread(str(paths[1]))[..., ::-1]
    (tmp_path / "a-bytes.jpg").write_bytes(paths[0].read_bytes())
    copies = [
        tmp_path / "a-bytes.jpg",
        write(tmp_path, "b-pixels.png", stored),
        write(tmp_path, "c-small.jpg", cv2.resize(eyes[2], (120, 120), interpolation=cv2.INTER_AREA)),
        write(tmp_path, "d-coarse.jpg", eyes[3], quality=40),
        write(tmp_path, "e-cropped.jpg", eyes[4][9:-9, 9:-9]),
        write(tmp_path, "f-mirrored.jpg", eyes[5][:, ::-1]),
        write(tmp_path, "g-upside.jpg", eyes[6][::-1]),
        write(tmp_path, "h-turned.jpg", eyes[7][::-1, ::-1]),
    ]
    assert links_of([*paths, *copies]) == [
        ("00.jpg", "a-bytes.jpg", "bytes", ""),
        ("01.jpg", "b-pixels.png", "pixels", ""),
        ("02.jpg", "c-small.jpg", "near", "120x120 beside 192x192 pixels"),
        ("03.jpg", "d-coarse.jpg", "near", "of one size, with other pixels"),
        ("04.jpg", "e-cropped.jpg", "near", "174x174 beside 192x192 pixels, borders cropped"),
        ("05.jpg", "f-mirrored.jpg", "near", "flipped left to right"),
        ("06.jpg", "g-upside.jpg", "near", "flipped top to bottom"),
        ("07.jpg", "h-turned.jpg", "near", "flipped both ways"),
    ]


def test_the_order_of_the_files_changes_nothing(tmp_path: Path, eyes: list[np.ndarray]) -> None:
    paths = [write(tmp_path, f"{at:02}.jpg", image) for at, image in enumerate(eyes[:6])]
    paths += [write(tmp_path, "small.jpg", cv2.resize(eyes[2], (120, 120), interpolation=cv2.INTER_AREA))]
    paths += [write(tmp_path, "cut.jpg", eyes[4][9:-9, 9:-9])]
    names = {frozenset(link[:2]) for link in links_of(paths)}
    assert names == {frozenset(("02.jpg", "small.jpg")), frozenset(("04.jpg", "cut.jpg"))}
    assert {frozenset(link[:2]) for link in links_of(paths[::-1])} == names


def test_a_second_look_decodes_nothing(tmp_path: Path, eyes: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    from eyetune.data.audit import looks

    paths = [write(tmp_path, f"{at}.jpg", image) for at, image in enumerate(eyes[:3])]
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    paths.append(tmp_path / "bad.jpg")
    first = Looker(Cache(tmp_path / "cache", 1)).all(paths, 1)
    decoded: list[Path] = []

    def noted(path: Path, bits: int | None = None) -> Look:
        decoded.append(path)
        return look_at(path, bits)

    monkeypatch.setattr(looks, "look_at", noted)
    second = Looker(Cache(tmp_path / "cache", 1)).all(paths, 1)
    assert decoded == [tmp_path / "bad.jpg"]
    for one, other in zip(first, second, strict=True):
        assert one.digest == other.digest
        assert one.fault == other.fault
        if one.look is not None:
            assert other.look is not None
            assert one.look.to_bytes() == other.look.to_bytes()
    assert "not an image" in second[-1].fault


def test_a_look_measures_the_file_as_it_is(tmp_path: Path, eyes: list[np.ndarray]) -> None:
    look = look_at(write(tmp_path, "eye.jpg", cv2.resize(eyes[0], (700, 600))))
    assert (look.width, look.height, look.mode) == (700, 600, "RGB")
    assert 0.6 < look.lit < 0.8
    assert look.spread > 60
    assert look.colour[0] > look.colour[1] > look.colour[2]
    gray = look_at(write(tmp_path, "gray.png", eyes[0][..., 1]))
    assert gray.mode == "L"
    blank = look_at(write(tmp_path, "blank.jpg", np.zeros((300, 300, 3), np.uint8)))
    assert blank.spread < 2


def test_same_bytes_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    for name, content in (("a", b"xy"), ("b", b"xy"), ("c", b"yx"), ("d", b"xy")):
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in ("a", "gone", "b", "c", "d", "nul\0")]
    assert same_bytes(paths) == [[0, 2, 4]]
    assert same_bytes(paths, Cache(tmp_path / "cache", 1)) == [[0, 2, 4]]


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=14))
@settings(max_examples=100, deadline=None)
def test_join_is_the_transitive_closure(count: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    reach = {a: {a} for a in range(count)}
    for _ in range(count):  # slowly: whoever is linked shares all that either reaches
        for a, b in pairs:
            both = reach[a] | reach[b]
            for c in both:
                reach[c] = reach[c] | both
    wanted = sorted({tuple(sorted(found)) for found in reach.values() if len(found) > 1})
    assert sorted(tuple(group) for group in join(count, pairs)) == wanted


def test_agreement_is_well_between_copies_and_strangers() -> None:
    assert 0.75 < AGREE < 0.93
