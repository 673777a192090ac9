"""Regions, element sets and occlusion: properties, and naive loops to compare with."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from muroan import modalities
from muroan.errors import MuroanError
from muroan.modalities import (
    Audio,
    Image,
    Layout,
    Region,
    Removal,
    Text,
    WordTokenizer,
    blanked,
    box_mask,
    delete_positions,
    elements,
    gaussian_blur,
    removed_elements,
    replace_boxes,
    stable_seed,
    word_edits,
)

settings.register_profile("muroan", deadline=None, max_examples=60)
settings.load_profile("muroan")


def mask_of(grid: tuple[int, ...], *regions: Region) -> np.ndarray:
    """The union of regions as a numpy mask, one coordinate at a time."""
    mask = np.zeros(grid, bool)
    for region in regions:
        for at in itertools.product(*(range(a, b) for a, b in zip(region.start, region.stop, strict=True))):
            mask[at] = True
    return mask


def bits_of(mask: np.ndarray) -> int:
    return sum(1 << i for i, taken in enumerate(mask.ravel()) if taken)


@st.composite
def grids_and_regions(draw, most_regions: int = 4, side: int = 9):
    """A grid of 1 to 3 axes and boxes in it."""
    grid = tuple(draw(st.lists(st.integers(1, side), min_size=1, max_size=3)))
    regions = []
    for _ in range(draw(st.integers(1, most_regions))):
        starts = [draw(st.integers(0, n - 1)) for n in grid]
        stops = [draw(st.integers(a + 1, n)) for a, n in zip(starts, grid, strict=True)]
        regions.append(Region("x", tuple(starts), tuple(stops)))
    return grid, regions


# ---------------------------------------------------------------------------------------------------------
# Regions


@given(grids_and_regions(most_regions=1, side=12))
def test_children_tile_their_parent(drawn):
    grid, (region,) = drawn
    children = region.halves()
    count = np.zeros(grid, int)
    for child in children:
        count += mask_of(grid, child)
    assert (count == mask_of(grid, region)).all()  # each element once, nothing outside
    assert sum(child.area for child in children) == region.area == mask_of(grid, region).sum()
    sides = [b - a for a, b in zip(region.start, region.stop, strict=True)]
    assert len(children) == 2 ** sum(side > 1 for side in sides)
    # The first child has the upper half of every axis, ceil(side / 2).
    assert [b - a for a, b in zip(children[0].start, children[0].stop, strict=True)] == [-(-s // 2) for s in sides]
    assert region.longest_side == max(sides)
    assert all(child.area > 0 and child.modality == "x" for child in children)


def test_quadrants_come_in_the_order_of_the_design():
    children = Region("image", (10, 20), (15, 24)).halves()
    assert [(c.start, c.stop) for c in children] == [
        ((10, 20), (13, 22)),  # top-left, axes are (y, x)
        ((13, 20), (15, 22)),  # bottom-left
        ((10, 22), (13, 24)),  # top-right
        ((13, 22), (15, 24)),  # bottom-right
    ]


def test_octants_and_halves():
    octants = Region("video", (0, 0, 0), (2, 2, 2)).halves()
    assert [c.start for c in octants] == [(x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)]
    assert [(c.start, c.stop) for c in Region("audio", (3,), (8,)).halves()] == [((3,), (6,)), ((6,), (8,))]
    assert Region("image", (4, 4), (5, 5)).halves() == [Region("image", (4, 4), (5, 5))]
    assert Image((4, 4)).split(Region("image", (4, 4), (5, 5))) == []


def test_an_image_of_224_is_cut_to_112_56_28_14_7():
    image, sides, counts = Image((224, 224)), [], []
    level = [image.root("image", Layout((224, 224)))]
    while level[0].longest_side > image.min_side:
        level = [child for region in level for child in image.split(region)]
        (side,) = {region.longest_side for region in level}
        sides.append(side)
        counts.append(len(level))
    assert sides == [112, 56, 28, 14, 7]
    assert counts == [4, 16, 64, 256, 1024]


def test_removals_keep_order_and_forget_doubles():
    a, b = Region("image", (0, 0), (1, 1)), Region("text", (0,), (1,))
    assert Removal.of(b, a, b).regions == (b, a)
    assert (Removal.of(a) | Removal.of(b, a)).regions == (a, b)
    assert Removal.of(a, b).without(a) == Removal.of(b)
    assert Removal.of(a, b).only("text") == Removal.of(b)
    assert Removal.of(b, a).modalities == ("image", "text")
    assert Removal().modalities == ()


# ---------------------------------------------------------------------------------------------------------
# Element sets


@given(grids_and_regions())
def test_elements_against_a_mask(drawn):
    grid, regions = drawn
    for region in regions:
        assert elements(region, grid) == bits_of(mask_of(grid, region))
    removed = removed_elements(Removal.of(*regions), {"x": Layout(grid)})
    union = mask_of(grid, *regions)
    assert removed == {"x": bits_of(union)}
    assert removed["x"].bit_count() == union.sum()  # an overlap counts once


@given(grids_and_regions(most_regions=1))
def test_equal_unions_are_equal(drawn):
    grid, (region,) = drawn
    layouts = {"x": Layout(grid)}
    whole = removed_elements(Removal.of(region), layouts)
    assert removed_elements(Removal.of(*region.halves()), layouts) == whole
    assert removed_elements(Removal.of(region.halves()[-1], region), layouts) == whole


def test_modalities_are_counted_apart():
    layouts = {"image": Layout((4, 6)), "text": Layout((3,)), "audio": Layout((7,))}
    removal = Removal.of(Region("text", (1,), (2,)), Region("image", (0, 0), (2, 3)), Region("image", (1, 1), (3, 3)))
    removed = removed_elements(removal, layouts)
    assert {name: bits.bit_count() for name, bits in removed.items()} == {"text": 1, "image": 6 + 4 - 2}
    assert Layout((4, 6)).count == 24


@pytest.mark.parametrize(
    ("start", "stop"),
    [((0, 0), (5, 1)), ((-1, 0), (1, 1)), ((2, 2), (2, 3)), ((3, 0), (1, 1)), ((0,), (1,)), ((0, 0, 0), (1, 1, 1))],
)
def test_a_region_outside_its_grid_is_refused(start, stop):
    with pytest.raises(MuroanError, match=r"'image' must lie inside its element grid \(4, 4\)"):
        elements(Region("image", start, stop), (4, 4))


def test_a_removal_of_an_absent_modality_is_refused():
    with pytest.raises(MuroanError, match=r"names modality 'sound', but the sample has \['image'\]"):
        removed_elements(Removal.of(Region("sound", (0,), (1,))), {"image": Layout((4, 4))})


# ---------------------------------------------------------------------------------------------------------
# Masks and the other primitives


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.data())
def test_box_mask_against_loops(shape, data):
    n, rows = len(shape), data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, 4))
    # Boxes of any kind: empty, reversed, reaching beyond the grid.
    boxes = data.draw(
        st.lists(
            st.lists(st.lists(st.integers(-1, 8), min_size=2 * n, max_size=2 * n), min_size=count, max_size=count),
            min_size=rows,
            max_size=rows,
        )
    )
    expected = np.zeros((rows, *shape), bool)
    for row, box in itertools.product(range(rows), range(count)):
        start, stop = boxes[row][box][:n], boxes[row][box][n:]
        for at in itertools.product(*map(range, shape)):
            expected[(row, *at)] |= all(a <= i < b for a, i, b in zip(start, at, stop, strict=True))
    mask = box_mask(torch.tensor(boxes), shape)
    assert mask.dtype == torch.bool
    assert (mask.numpy() == expected).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("followed", [False, True])
def test_blanked_keeps_every_bit_outside_the_mask(dtype, followed):
    """As `masked_fill` does, of what is no number too, and where gradients are followed."""
    x = torch.randn(4, 3, 5, 7, dtype=torch.float64).to(dtype)
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = math.nan, -math.inf, -0.0
    x.requires_grad_(followed)
    mask = torch.rand(4, 1, 5, 7) < 0.4
    found, expected = blanked(x, mask).detach(), x.detach().masked_fill(mask, 0)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    if followed:
        (gradient,) = torch.autograd.grad(blanked(x, mask).abs().sum(), x)
        assert (gradient[mask.expand_as(x)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.complex128])
@pytest.mark.parametrize("values", [0, 3, torch.randn(4, 3, 5, 7, dtype=torch.float64)], ids=["zero", "three", "own"])
@pytest.mark.parametrize("count", [1, 20 * modalities.FEW_BOXES])  # written one by one, or by a mask
def test_values_in_boxes_leave_every_bit_elsewhere(dtype, values, count):
    x = (5 * torch.randn(4, 3, 5, 7, dtype=torch.float64)).to(dtype)
    if dtype != torch.int64:
        x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = math.nan, -math.inf, -0.0
    before, boxes = x.clone(), torch.randint(-1, 7, (4, count, 4))
    boxes[3] = 0  # none in the last row
    found = replace_boxes(x, boxes, values)
    assert torch.equal(x.view(torch.uint8), before.view(torch.uint8))
    expected = before
    for row, box in itertools.product(range(4), range(count)):
        a, b, c, d = boxes[row, box].tolist()
        for i, j in itertools.product(range(5), range(7)):
            if a <= i < c and b <= j < d:
                expected[row, :, i, j] = values if isinstance(values, int) else values[row, :, i, j].to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_delete_positions_closes_the_gaps(removed):
    x = torch.arange(100, 100 + len(removed))[None]
    kept = [int(v) for v, gone in zip(x[0], removed, strict=True) if not gone]
    result = delete_positions(x, torch.tensor([removed]), -7)
    assert result.tolist() == [kept + [-7] * sum(removed)]


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.3, 4), st.floats(-3, 3))
@settings(max_examples=25)
def test_blur_keeps_constants(height, width, sigma, value):
    x = torch.full((2, 2, height, width), value, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(x, sigma, 2), x)
    torch.testing.assert_close(gaussian_blur(x[..., 0], sigma, 1), x[..., 0])


@pytest.mark.parametrize("axes", [1, 2])
def test_blur_keeps_the_total_weight_and_is_a_gaussian(axes):
    sigma, size = 2.0, 41
    x = torch.zeros((1, 1) + (size,) * axes, dtype=torch.float64)
    x[(0, 0) + (20,) * axes] = 5.0
    blurred = gaussian_blur(x, sigma, axes)
    assert float(blurred.sum()) == pytest.approx(5.0)  # far from the edges nothing is lost
    assert float(blurred.min()) >= 0
    line = blurred[0, 0] if axes == 1 else blurred[0, 0, :, 20]
    weights = [math.exp(-0.5 * (d / sigma) ** 2) if abs(d) <= 6 else 0 for d in range(-20, 21)]
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights) * float(line.sum())
    torch.testing.assert_close(line, expected)
    if axes == 2:
        torch.testing.assert_close(blurred, blurred.transpose(2, 3))


WORD_EDITS = [
    ("a b c", "a b c", 0),
    ("a b c", "a x c", 1),
    ("a b c", "b c", 1),  # by position all three would differ
    ("a b c", "x a b c", 1),
    ("a b c d", "b c d e", 2),
    ("a b", "b a", 2),
    ("a b c", "x y", 3),
    ("", "a b", 2),
    ("is it a red circle", "is there not a blue circle", 3),  # there, not and blue for it and red
]


@pytest.mark.parametrize(("before", "after", "count"), WORD_EDITS)
def test_word_edits_by_hand(before, after, count):
    pairs = word_edits(before.split(), after.split())
    assert sum(old != new for old, new in pairs) == count


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_word_edits_are_the_fewest_and_make_the_other_text(before, after):
    @functools.cache
    def fewest(i: int, j: int) -> int:
        if i == len(before) or j == len(after):
            return len(before) - i + len(after) - j
        return min(fewest(i + 1, j + 1) + (before[i] != after[j]), fewest(i + 1, j) + 1, fewest(i, j + 1) + 1)

    pairs = word_edits(before, after)
    assert [old for old, _ in pairs if old is not None] == before
    assert [new for _, new in pairs if new is not None] == after
    assert sum(old != new for old, new in pairs) == fewest(0, 0)


def test_seeds_are_stable():
    # A change of this number would silently change the noise of every earlier run.
    assert stable_seed(0, "noise", "sample") == stable_seed(0, "noise", "sample") == 5626055856686376860
    assert stable_seed(0, "ab", "c") != stable_seed(0, "a", "bc")
    assert 0 <= stable_seed("x") < 2**63


# ---------------------------------------------------------------------------------------------------------
# Preparing


@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_an_rgb_image_is_normalised_by_channel(size):
    image = Image(size, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    raw = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    x, layout = image.prepare(raw)
    assert x.shape == image.shape == (3, *size)
    assert x.dtype == torch.float32
    assert layout.grid == size
    for c, y, w in itertools.product(range(3), range(size[0]), range(size[1])):
        expected = (raw[y, w, c] / 255 - image.mean[c]) / image.std[c]
        assert float(x[c, y, w]) == pytest.approx(expected, abs=1e-6)
    same, _ = image.prepare(PILImage.fromarray(raw))
    assert torch.equal(same, x)


def test_grey_and_colour_are_converted():
    grey = np.random.default_rng(0).integers(0, 256, (6, 6), dtype=np.uint8)
    as_colour, _ = Image((6, 6)).prepare(grey)
    assert as_colour.shape == (3, 6, 6)
    assert torch.equal(as_colour[0], as_colour[2])
    as_grey, _ = Image((6, 6), mean=(0.5,), std=(0.5,)).prepare(grey)
    assert as_grey.shape == (1, 6, 6)
    assert torch.equal(as_grey[0], as_colour[0])
    one, _ = Image((6, 6), mean=(0.5,), std=(0.5,)).prepare(PILImage.new("RGBA", (6, 6), (255, 255, 255, 0)))
    assert torch.equal(one, torch.ones(1, 6, 6))


def test_another_size_is_resized():
    x, layout = Image((4, 10)).prepare(PILImage.new("RGB", (31, 17), (255, 0, 255)))
    assert (x.shape, layout.grid) == ((3, 4, 10), (4, 10))
    torch.testing.assert_close(x[:, 2, 3], torch.tensor([1.0, -1.0, 1.0]))


def test_image_messages():
    with pytest.raises(MuroanError, match="must be a PIL image or an array of bytes, got str"):
        Image((4, 4)).prepare("picture.png")
    with pytest.raises(MuroanError, match="1 or 3 channels"):
        Image((4, 4), mean=(0.5, 0.5), std=(0.5, 0.5))
    with pytest.raises(MuroanError, match="1 or 3 channels"):
        Image((4, 4), mean=(0.5, 0.5, 0.5), std=(0.5,))


@pytest.mark.parametrize(
    "raw",
    [
        np.full((4, 4), 0.8, np.float32),  # as Pillow reads it, 0.8 of 255: black
        np.full((4, 4, 3), 0.8),
        np.full((4, 4), 40000, np.uint16),
        np.full((4, 4), 200, np.int64),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_an_array_that_is_no_picture_of_bytes_is_refused(raw):
    with pytest.raises(MuroanError, match="an array"):
        Image((4, 4)).prepare(raw)


def test_an_array_of_one_channel_is_taken():
    raw = np.random.default_rng(0).integers(0, 256, (4, 4, 1), dtype=np.uint8)
    image = Image((4, 4), mean=(0.5,), std=(0.5,))
    assert torch.equal(image.prepare(raw)[0], image.prepare(raw[..., 0])[0])


def test_a_sound_is_padded_or_cut():
    audio = Audio(6, 1000)
    assert audio.min_side == 10
    x, layout = audio.prepare([0.5, -0.5, 0.25])
    assert x.tolist() == [0.5, -0.5, 0.25, 0, 0, 0]
    assert layout.grid == (3,)
    x, layout = audio.prepare(np.arange(9) / 10)
    assert x.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert layout.grid == (6,)


@pytest.mark.parametrize("raw", [[], [[0.1, 0.2]], [0.1, float("nan")], [float("inf")], None])
def test_sound_messages(raw):
    with pytest.raises(MuroanError, match=r"a sound must be a non-empty row of finite numbers, got shape \("):
        Audio(6, 1000).prepare(raw)


VOCABULARY = ["what", "is", "it", "?", "don", "t", "'", "red"]
PAD, UNK, CLS, SEP, MASK = range(5)
WHAT, IS, IT, QUERY, DON, T, QUOTE, RED = range(5, 13)


def text(max_length: int = 10, truncate: bool = False) -> Text:
    return Text(WordTokenizer(VOCABULARY), max_length, truncate)


def test_word_tokenizer():
    tokenizer = WordTokenizer(VOCABULARY)
    assert tokenizer.words_to_ids(["What", "don't", "green", "?", "it?"]) == [
        [WHAT],
        [DON, QUOTE, T],
        [UNK],
        [QUERY],
        [IT, QUERY],
    ]
    assert tokenizer.size == 13
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.prefix, tokenizer.suffix) == (PAD, MASK, [CLS], [SEP])
    # Frequent ones first, ties in alphabetical order.
    assert WordTokenizer.from_texts(["b a?", "A c b", "a"]).vocabulary == ["a", "b", "?", "c"]
    assert WordTokenizer.from_texts(["b a?", "A c b", "a"], most=2).vocabulary == ["a", "b"]


def test_a_text_knows_where_its_words_lie():
    x, layout = text().prepare("  What don't\tit? ")
    assert x.tolist() == [CLS, WHAT, DON, QUOTE, T, IT, QUERY, SEP, PAD, PAD]
    assert x.dtype == torch.int64
    assert layout == Layout((3,), ((1, 2), (2, 5), (5, 7)), ("What", "don't", "it?"))
    assert text().box(Region("text", (1,), (3,)), layout) == (2, 7)
    assert text().split(Region("text", (0,), (3,))) == [Region("text", (i,), (i + 1,)) for i in range(3)]
    assert text().split(Region("text", (1,), (2,))) == []


def test_a_text_that_just_fits():
    x, layout = text(4).prepare("what is")
    assert x.tolist() == [CLS, WHAT, IS, SEP]
    assert layout.count == 2


@pytest.mark.parametrize("raw", ["", "  \n "])
def test_an_empty_text_is_refused(raw):
    with pytest.raises(MuroanError, match="at least one word"):
        text().prepare(raw)


def test_text_messages():
    with pytest.raises(MuroanError, match="must be a string, got int"):
        text().prepare(3)
    with pytest.raises(MuroanError, match=r"3 words is 8 tokens .* takes 7.*truncate=true.*begins \"what don"):
        text(7).prepare("what don't it?")
    with pytest.raises(MuroanError, match="not even the first word"):
        text(4, truncate=True).prepare("don't")


def test_truncation_leaves_whole_words_out():
    x, layout = text(7, truncate=True).prepare("what don't it? red")
    assert x.tolist() == [CLS, WHAT, DON, QUOTE, T, SEP, PAD]  # "it?" would need two places, and "red" comes after it
    assert layout == Layout((2,), ((1, 2), (2, 5)), ("what", "don't"))


# ---------------------------------------------------------------------------------------------------------
# Occlusion

IMAGE = Image((6, 5), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
AUDIO = Audio(12, 3000)
GENERATOR = torch.Generator().manual_seed(7)
PICTURES = torch.randn(4, 3, 6, 5, generator=GENERATOR) + 0.3
SOUNDS = torch.randn(4, 12, generator=GENERATOR) + 0.2
SEEDS = [11, 12, 13, 14]


def direct_blur(x: np.ndarray, sigma: float, axes: int) -> np.ndarray:
    """The blur as a sum over neighbours, coordinate by coordinate, with the edge repeated."""
    radius = max(1, math.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in range(x.ndim - axes, x.ndim):
        n = x.shape[axis]
        taken = [x.take(np.clip(np.arange(n) + o, 0, n - 1), axis) for o in range(-radius, radius + 1)]
        x = sum(w * t for w, t in zip(weights, taken, strict=True))
    return x


def expected_values(modality, x: torch.Tensor, replacement: str, seeds: list[int]) -> torch.Tensor:
    """What should stand in for every element, were all of them removed; each row by itself."""
    axes = 2 if isinstance(modality, Image) else 1
    rows = []
    for row, seed in zip(x, seeds, strict=True):
        channels = row.double().numpy().reshape(-1, *row.shape[-axes:])
        means = channels.reshape(len(channels), -1).mean(1).reshape(-1, *[1] * axes)
        stds = channels.reshape(len(channels), -1).std(1).reshape(-1, *[1] * axes)
        if replacement == "zero":
            value = np.zeros_like(channels)
        elif replacement == "mean":
            value = np.broadcast_to(means, channels.shape)
        elif replacement == "blur":
            value = direct_blur(channels, max(modality.size) / 16 if axes == 2 else modality.rate / 1000, axes)
        else:
            noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(seed)).double().numpy()
            value = means + noise.reshape(channels.shape) * stds
        rows.append(torch.tensor(value.reshape(row.shape)).float())
    return torch.stack(rows)


@st.composite
def some_boxes(draw, shape: tuple[int, ...], rows: int = 4):
    """Boxes of each row, some of them empty, all rows padded to one number."""
    n, most = len(shape), draw(st.integers(1, 3))
    boxes = []
    for _ in range(rows):
        row = []
        for _ in range(draw(st.integers(0, most))):
            starts = [draw(st.integers(0, s - 1)) for s in shape]
            row.append([*starts, *(draw(st.integers(a + 1, s)) for a, s in zip(starts, shape, strict=True))])
        boxes.append(row + [[0] * (2 * n)] * (most - len(row)))
    return torch.tensor(boxes)


def mask_of_boxes(boxes: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros(len(boxes), *shape, dtype=torch.bool)
    for row, many in enumerate(boxes.tolist()):
        for box in many:
            sides = zip(box[: len(shape)], box[len(shape) :], strict=True)
            mask[(row, *(slice(a, b) for a, b in sides))] = True
    return mask


CONTINUOUS = [(IMAGE, PICTURES, r) for r in Image.replacements] + [
    (AUDIO, SOUNDS, r) for r in Audio.replacements if r != "delete"
]


def baselines(modality, x, replacement, seeds):
    """Of each row, or None; every sound fills its room."""
    layout = Layout(modality.shape[-2:] if isinstance(modality, Image) else modality.shape)
    rows = [modality.baseline(row, layout, replacement, seed) for row, seed in zip(x, seeds, strict=True)]
    return None if rows[0] is None else torch.stack(rows)


@pytest.mark.parametrize("replacement", ["mean", "blur", "noise"])
def test_padding_has_no_say_in_what_replaces_a_sound(replacement):
    short, long = Audio(10, 4000), Audio(100, 4000)
    wave = np.linspace(0.5, 1, 10, dtype=np.float32)
    expected = short.baseline(*short.prepare(wave), replacement, 7)
    padded = long.baseline(*long.prepare(wave), replacement, 7)
    assert torch.equal(padded[:10], expected)
    assert (padded[10:] == 0).all()


@pytest.mark.parametrize("modality", [Image((1, 1)), Audio(5, 1000)])
def test_noise_for_a_single_value_is_that_value(modality):
    x, layout = modality.prepare(np.ones((1, 1, 3), np.uint8) if isinstance(modality, Image) else [0.5])
    values = modality.baseline(x, layout, "noise", 1)
    assert torch.equal(values, x)


@pytest.mark.parametrize(("modality", "x", "replacement"), CONTINUOUS)
@given(data=st.data())
@settings(max_examples=15)
def test_occlusion_of_continuous_inputs(modality, x, replacement, data):
    shape = modality.shape[-2:]
    shape = shape if isinstance(modality, Image) else modality.shape
    boxes = data.draw(some_boxes(shape))
    before = x.clone()
    baseline = baselines(modality, x, replacement, SEEDS)
    occluded = modality.occlude(x, boxes, replacement, baseline)
    assert torch.equal(x, before)  # the input itself is left alone
    mask = mask_of_boxes(boxes, shape)
    mask = mask[:, None].expand_as(x) if isinstance(modality, Image) else mask
    assert torch.equal(occluded[~mask], x[~mask])  # bit for bit
    expected = expected_values(modality, x, replacement, SEEDS)
    if replacement == "zero":
        assert (occluded[mask] == 0).all()
    torch.testing.assert_close(occluded[mask], expected[mask], rtol=1e-4, atol=1e-5)
    # One by one it is the same, bit for bit.
    for i in range(len(x)):
        own = baselines(modality, x[i : i + 1], replacement, SEEDS[i : i + 1])
        alone = modality.occlude(x[i : i + 1], boxes[i : i + 1], replacement, own)
        assert torch.equal(alone[0], occluded[i])


@pytest.mark.parametrize(("modality", "x", "replacement"), [*CONTINUOUS, (AUDIO, SOUNDS, "delete")])
def test_padding_boxes_change_nothing(modality, x, replacement):
    axes = 2 if isinstance(modality, Image) else 1
    boxes = torch.zeros(len(x), 3, 2 * axes, dtype=torch.long)
    baseline = baselines(modality, x, replacement, SEEDS)
    assert torch.equal(modality.occlude(x, boxes, replacement, baseline), x)


@pytest.mark.parametrize(("modality", "x"), [(IMAGE, PICTURES), (AUDIO, SOUNDS)])
def test_noise_depends_on_the_seed_alone(modality, x):
    first, second = (baselines(modality, x, "noise", SEEDS) for _ in range(2))
    assert torch.equal(first, second)
    other = baselines(modality, x, "noise", [99, *SEEDS[1:]])
    assert not torch.isclose(other[0], first[0]).any()
    assert torch.equal(other[1:], first[1:])
    shuffled = baselines(modality, x.flip(0), "noise", SEEDS[::-1])
    assert torch.equal(shuffled.flip(0), first)
    # It has about the moments of the input: 90 and 12 draws.
    assert abs(float((first - x.mean()).mean())) < 0.5


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    baselines(IMAGE, PICTURES, "noise", SEEDS)
    assert torch.equal(torch.rand(2), expected)


@given(boxes=some_boxes((12,)))
def test_deleting_sound_closes_the_gap(boxes):
    occluded = AUDIO.occlude(SOUNDS, boxes, "delete", None)
    mask = mask_of_boxes(boxes, (12,))
    for x, gone, result in zip(SOUNDS, mask, occluded, strict=True):
        kept = x[~gone]
        assert torch.equal(result[: len(kept)], kept)
        assert (result[len(kept) :] == 0).all()


TEXTS = ["what is it? red", "don't", "red red green don't ?", "is it?"]


@given(gone=st.lists(st.sets(st.integers(0, 4)), min_size=len(TEXTS), max_size=len(TEXTS)), join=st.booleans())
def test_words_are_deleted_or_masked(gone, join):
    modality = text(12)
    xs, layouts = zip(*map(modality.prepare, TEXTS), strict=True)
    rows = []
    for layout, words in zip(layouts, gone, strict=True):
        regions = [Region("text", (i,), (i + 1,)) for i in sorted(words) if i < layout.count]
        if join and len(regions) == layout.count:
            regions = [Region("text", (0,), (layout.count,))]  # all words as one region
        rows.append([modality.box(region, layout) for region in regions])
    most = max(1, *map(len, rows))
    boxes = torch.tensor([row + [(0, 0)] * (most - len(row)) for row in rows])
    x = torch.stack(xs)
    deleted = modality.occlude(x, boxes, "delete", None)
    masked = modality.occlude(x, boxes, "mask", None)
    for i, (raw, layout) in enumerate(zip(TEXTS, layouts, strict=True)):
        words = raw.split()
        left = [word for j, word in enumerate(words) if j not in gone[i]]
        ids = [CLS, *itertools.chain(*modality.tokenizer.words_to_ids(left)), SEP]
        assert deleted[i].tolist() == ids + [PAD] * (12 - len(ids))
        expected = x[i].tolist()
        for j, (start, stop) in enumerate(layout.spans):
            if j in gone[i]:
                expected[start:stop] = [MASK] * (stop - start)
        assert masked[i].tolist() == expected
        assert torch.equal(modality.occlude(x[i : i + 1], boxes[i : i + 1], "delete", None)[0], deleted[i])
        assert torch.equal(modality.occlude(x[i : i + 1], boxes[i : i + 1], "mask", None)[0], masked[i])


def test_a_replacement_that_does_not_fit_is_refused():
    for modality, good in ((IMAGE, Image.replacements), (AUDIO, Audio.replacements), (text(), Text.replacements)):
        for replacement in ("zero", "mean", "blur", "noise", "mask", "delete", "nothing"):
            if replacement in good:
                modality.check_replacement("it", replacement)
            else:
                with pytest.raises(MuroanError, match=rf"'{replacement}': set threat_model.replacement.it to one"):
                    modality.check_replacement("it", replacement)
    tokenizer = WordTokenizer(VOCABULARY)
    tokenizer.mask_id = None
    with pytest.raises(MuroanError, match="no mask token; use 'delete'"):
        Text(tokenizer, 8).check_replacement("text", "mask")


# ---------------------------------------------------------------------------------------------------------
# Display


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_survives_display(channels):
    image = Image((7, 9), mean=(0.45, 0.5, 0.55)[:channels], std=(0.2, 0.25, 0.3)[:channels])
    raw = np.random.default_rng(1).integers(0, 256, (7, 9, 3) if channels == 3 else (7, 9), dtype=np.uint8)
    shown = image.display(*image.prepare(raw))
    assert (shown["kind"], shown["grid"]) == ("image", [7, 9])
    decoded = np.asarray(PILImage.open(io.BytesIO(base64.b64decode(shown["png"]))))
    assert (decoded == raw).all()


def test_a_text_and_a_sound_survive_display():
    assert text().display(*text().prepare("What is it?")) == {
        "kind": "text",
        "grid": [3],
        "words": ["What", "is", "it?"],
    }
    shown = AUDIO.display(*AUDIO.prepare([0.5, -0.25, 0.125]))
    assert shown == {
        "kind": "audio",
        "grid": [3],
        "rate": 3000,
        "peaks": [[0.5, 0.5], [-0.25, -0.25], [0.125, 0.125]],
    }
    wave = np.sin(np.arange(900)).astype(np.float32)
    peaks = Audio(1000, 8000).display(*Audio(1000, 8000).prepare(wave))["peaks"]
    assert len(peaks) == 300  # three samples each
    assert peaks[1] == [round(float(wave[3:6].min()), 3), round(float(wave[3:6].max()), 3)]
