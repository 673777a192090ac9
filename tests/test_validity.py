"""Whether a label is still right after a removal: the questions and pictures of easy-VQA, the digits of digit_sum."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from muroan.data.base import MultimodalData
from muroan.data.digit_sum import DigitSum
from muroan.data.easy_vqa import COLOURS, KINDS, EasyVQA, answer
from muroan.data.samples import Sample
from muroan.errors import MuroanError
from muroan.modalities import Image, Layout, Region, Removal, element_mask, elements


@pytest.fixture(scope="module")
def easy_vqa() -> EasyVQA:
    return EasyVQA()


@pytest.fixture(scope="module")
def samples(easy_vqa) -> dict[str, Sample]:
    """Those about the first hundred test pictures of the package, and picture 364."""
    data, wanted = easy_vqa.prepared("test"), {f"test-{k}" for k in (*range(100), 364, 432, 774)}
    return {e.id: data[i] for i, e in enumerate(data.examples) if e.group in wanted}


@pytest.fixture(scope="module")
def digit_sum(tmp_path_factory) -> DigitSum:
    """The digits of one speaker, as a tone that tells the digit."""
    folder = tmp_path_factory.mktemp("fsdd")
    for digit in range(10):
        tone = np.sin(np.arange(400 + 10 * digit) * (digit + 1) / 10)
        wavfile.write(folder / f"{digit}_theo_0.wav", 8000, (9000 * tone).astype(np.int16))
    return DigitSum(str(folder), test_size=40)


def words_removed(sample: Sample, *words: str) -> Removal:
    places = [sample.layouts["text"].words.index(word) for word in words]
    return Removal.of(*(Region("text", (i,), (i + 1,)) for i in places))


def box(y: int, x: int, bottom: int, right: int) -> Removal:
    return Removal.of(Region("image", (y, x), (bottom, right)))


# ---------------------------------------------------------------------------------------------------------
# Bit sets as masks


def test_element_mask_by_hand():
    assert element_mask(0, (2, 2)).tolist() == [[False, False], [False, False]]
    assert element_mask(0b1000_0000_0001, (12,)).nonzero()[0].tolist() == [0, 11]
    assert element_mask(0b010_110, (2, 3)).tolist() == [[False, True, True], [False, True, False]]


@given(st.data())
def test_element_mask_of_a_region_is_its_box(data):
    grid = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    start = tuple(data.draw(st.integers(0, n - 1)) for n in grid)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid, strict=True))
    expected = np.zeros(grid, bool)
    expected[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    mask = element_mask(elements(Region("x", start, stop), grid), grid)
    assert (mask.dtype, mask.shape) == (bool, grid)
    assert (mask == expected).all()


# ---------------------------------------------------------------------------------------------------------
# Questions about a shape


@pytest.mark.parametrize("split", ["test", "val", pytest.param("train", marks=pytest.mark.slow)])
def test_what_the_pictures_show_answers_every_question_of_the_package(easy_vqa, split):
    for example in easy_vqa.examples(split):
        scene = easy_vqa.scene(example.id, (64, 64))
        assert answer(example.inputs["text"].split(), scene.colour, scene.kind) == easy_vqa.classes[example.label]
        assert scene.pixels.bit_count() >= 24


@pytest.mark.parametrize(
    ("sample", "question", "label", "removed", "valid"),
    [
        # The colour is asked as long as "color" is there; the picture has one shape.
        ("test-3-2", "what color is the shape?", "yellow", "what", True),
        ("test-3-2", "what color is the shape?", "yellow", "what is the shape?", True),
        ("test-3-2", "what color is the shape?", "yellow", "color", False),  # what is the shape? a rectangle
        ("test-774-2", "what color is the triangle?", "black", "triangle?", True),
        ("test-774-2", "what color is the triangle?", "black", "color", False),
        ("test-364-1", "what is the color of the rectangle?", "black", "what is of", True),
        ("test-364-1", "what is the color of the rectangle?", "black", "color", False),
        # The kind is asked with "what" and something that it is about.
        ("test-432-0", "what shape is in the image?", "circle", "shape", True),  # what is in the image?
        ("test-432-0", "what shape is in the image?", "circle", "image?", True),
        ("test-432-0", "what shape is in the image?", "circle", "what", False),  # is a shape in the image?
        ("test-432-0", "what shape is in the image?", "circle", "shape image?", False),  # what is in the?
        ("test-432-1", "what shape does the image contain?", "circle", "shape", True),
        ("test-432-1", "what shape does the image contain?", "circle", "does the", True),
        ("test-432-1", "what shape does the image contain?", "circle", "what", False),
        ("test-4-0", "what shape is present?", "circle", "is", True),
        ("test-4-0", "what shape is present?", "circle", "what", False),
        ("test-432-2", "what is the green shape?", "circle", "green", True),
        ("test-432-2", "what is the green shape?", "circle", "shape?", True),
        ("test-432-2", "what is the green shape?", "circle", "what", False),
        ("test-432-2", "what is the green shape?", "circle", "green shape?", False),  # what is the?
        # A yes or no turns with the negation, and with what is looked for.
        ("test-432-3", "is there a triangle?", "no", "is", True),
        ("test-432-3", "is there a triangle?", "no", "is there", True),
        ("test-432-3", "is there a triangle?", "no", "is there a", False),  # triangle?
        ("test-432-3", "is there a triangle?", "no", "triangle?", False),
        ("test-432-4", "is there not a triangle in the image?", "yes", "in the image?", True),
        ("test-432-4", "is there not a triangle in the image?", "yes", "not", False),
        ("test-432-5", "is there not a red shape?", "yes", "shape?", True),
        ("test-432-5", "is there not a red shape?", "yes", "not", False),
        ("test-432-5", "is there not a red shape?", "yes", "red", False),  # is there not a shape? no
        ("test-432-5", "is there not a red shape?", "yes", "not red", True),  # is there a shape? yes
        ("test-432-7", "is a blue shape present?", "no", "a", True),
        ("test-432-7", "is a blue shape present?", "no", "blue", False),  # is a shape present? yes
        ("test-432-7", "is a blue shape present?", "no", "a present?", False),  # is blue shape?
        ("test-432-8", "does the image not contain a blue shape?", "yes", "does", True),
        ("test-432-8", "does the image not contain a blue shape?", "yes", "not", False),
        ("test-774-5", "is no black shape present?", "no", "black", True),  # is no shape present? no
        ("test-774-5", "is no black shape present?", "no", "no", False),
        ("test-774-3", "does the image contain a circle?", "no", "circle?", False),
        ("test-2-8", "is there a blue shape?", "yes", "blue", True),  # is there a shape? yes
        ("test-7-4", "is there a circle?", "yes", "circle?", False),
    ],
)
def test_what_is_left_of_a_question(easy_vqa, samples, sample, question, label, removed, valid):
    asked = samples[sample]
    assert " ".join(asked.layouts["text"].words) == question
    assert easy_vqa.classes[asked.label] == label
    assert easy_vqa.still_valid(asked, Removal()) is True
    assert easy_vqa.still_valid(asked, words_removed(asked, *removed.split())) is valid


def test_a_word_that_stands_twice_is_removed_once(easy_vqa, samples):
    asked = samples["test-364-1"]
    assert asked.layouts["text"].words.count("the") == 2
    assert easy_vqa.still_valid(asked, words_removed(asked, "the", "of", "rectangle?")) is True
    # "is there not a triangle in the image?" without its last three words, as one region.
    asked = samples["test-432-4"]
    assert easy_vqa.still_valid(asked, Removal.of(Region("text", (5,), (8,)))) is True
    assert easy_vqa.still_valid(asked, Removal.of(Region("text", (4,), (8,)))) is False


WORDS = [*COLOURS, *KINDS, "shape?", "what", "color", "no", "not", "is", "there", "a", "the", "in", "image?"]


def test_questions_are_read_in_any_case_and_without_their_mark():
    assert answer(["IS", "There", "a", "Circle", "?"], "red", "circle") == "yes"
    assert answer([], "red", "circle") is None


def test_what_is_left_of_a_shape(easy_vqa, samples):
    # Picture 364 has a black rectangle in rows 0 to 19 and columns 49 to 57.
    asked = samples["test-364-0"]
    scene = easy_vqa.scene(asked.id, (64, 64))
    rectangle = np.zeros((64, 64), bool)
    rectangle[0:20, 49:58] = True
    assert (scene.colour, scene.kind) == ("black", "rectangle")
    assert (element_mask(scene.pixels, (64, 64)) == rectangle).all()

    def valid(removal: Removal, visible: float = 0.5) -> bool | None:
        data = EasyVQA(visible=visible)
        return data.still_valid(asked, removal)

    assert valid(box(0, 0, 10, 64)) is True  # half of it is left
    assert valid(box(0, 0, 11, 64)) is False
    assert valid(box(0, 0, 64, 49), visible=1.0) is True  # the ground alone
    assert valid(box(0, 0, 1, 50), visible=1.0) is False  # one of its 180 pixels
    assert valid(box(0, 0, 19, 64), visible=0.05) is True
    assert valid(box(0, 0, 20, 64), visible=0.05) is False
    # Regions that overlap count once; both parts of a removal have to leave the label right.
    assert valid(box(0, 0, 10, 64) | box(0, 49, 10, 58)) is True
    assert valid(box(0, 0, 10, 64) | words_removed(asked, "shape")) is True
    assert valid(box(0, 0, 10, 64) | words_removed(asked, "what")) is False


def test_shapes_on_the_grid_of_another_model(easy_vqa):
    fine, coarse = easy_vqa.scene("test-364-0", (128, 192)), easy_vqa.scene("test-364-0", (32, 32))
    rows, columns = element_mask(fine.pixels, (128, 192)).nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 39, 147, 173)
    rows, columns = element_mask(coarse.pixels, (32, 32)).nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 9, 24, 28)
    data = EasyVQA(test_limit=1)
    data.prepare_for({"image": Image((1, 1)), "text": data.modalities()["text"]})
    assert data.still_valid(data.prepared("test")[0], Removal()) is None


@pytest.fixture(scope="module")
def first(samples) -> list[Sample]:
    return list(samples.values())


def test_removing_nothing_leaves_every_label_right(easy_vqa, first):
    assert all(easy_vqa.still_valid(sample, Removal()) is True for sample in first)


def boxes(side: int):
    """A box of an image of side x side pixels."""
    edges = st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True).map(sorted)
    return st.tuples(edges, edges).map(lambda e: box(e[0][0], e[1][0], e[0][1], e[1][1]))


@settings(deadline=None)
@given(st.data(), boxes(64), boxes(64))
def test_removing_more_of_a_picture_never_makes_a_label_right_again(easy_vqa, first, data, less, more):
    sample = data.draw(st.sampled_from(first), "sample")
    words = data.draw(st.sets(st.sampled_from(sample.layouts["text"].words)), "words")
    less |= words_removed(sample, *words)
    assert easy_vqa.still_valid(sample, less) in (True, False)
    assert easy_vqa.still_valid(sample, less) or not easy_vqa.still_valid(sample, less | more)


@given(st.lists(st.sampled_from(WORDS)))
def test_any_words_have_an_answer_of_the_dataset_or_none(easy_vqa, words):
    assert answer(words, "red", "circle") in (None, *easy_vqa.classes)
    assert answer(words, "red", "circle") == answer(reversed(words), "red", "circle")


def test_a_dataset_that_cannot_tell_says_none(easy_vqa, samples):
    asked = samples["test-364-0"]
    assert MultimodalData.still_valid(easy_vqa, asked, Removal()) is None
    data = EasyVQA(use=["image"], test_limit=1)
    assert data.still_valid(data.prepared("test")[0], box(0, 0, 64, 64)) is None


def test_what_is_no_sample_or_no_removal_of_it_is_refused(easy_vqa, samples):
    asked = samples["test-364-0"]
    for stranger, reason in (
        ("toy-1-0", "'toy-1-0' is not one of easy_vqa"),
        ("7", "is not one of"),
        ("test-99999-0", "easy_vqa has no picture test-99999"),
        ("test-x-0", "no picture test-x"),
    ):
        with pytest.raises(MuroanError, match=reason):
            easy_vqa.scene(stranger, (64, 64))
    with pytest.raises(MuroanError, match="must lie inside its element grid"):
        easy_vqa.still_valid(asked, box(0, 0, 65, 64))
    with pytest.raises(MuroanError, match="names modality 'audio'"):
        easy_vqa.still_valid(asked, Removal.of(Region("audio", (0,), (1,))))


@pytest.mark.parametrize("visible", [0, -0.1, 1.01, float("nan"), "abc", True])
def test_the_visible_share_is_checked(visible):
    for build in (lambda: EasyVQA(visible=visible), lambda: DigitSum("x", visible=visible)):
        with pytest.raises(MuroanError, match=r"dataset\.visible must be a number above 0 and at most 1, got"):
            build()


# ---------------------------------------------------------------------------------------------------------
# The sum of two digits


def test_ink_and_energy_by_hand():
    # The ground is -1: ink 2, 0, 1, 1. Four samples, of energy 1, 4, 4, 1, and padding that is none.
    image = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    wave = torch.tensor([1.0, -2.0, 2.0, -1.0, 9.0])
    pair = Sample("hand", 0, {"image": image, "audio": wave}, {"image": Layout((2, 2)), "audio": Layout((4,))}, 7)

    def valid(*regions: Region, visible: float = 0.5) -> bool | None:
        return DigitSum("x", visible=visible).still_valid(pair, Removal.of(*regions))

    def pixel(y: int, x: int) -> Region:
        return Region("image", (y, x), (y + 1, x + 1))

    def stretch(start: int, stop: int) -> Region:
        return Region("audio", (start,), (stop,))

    assert valid(visible=1.0) is True
    assert valid(pixel(0, 1), visible=1.0) is True
    assert valid(pixel(0, 0)) is True  # 2 of 4 are left
    assert valid(pixel(0, 0), pixel(1, 0)) is False
    assert valid(pixel(0, 0), pixel(1, 0), visible=0.25) is True
    assert valid(stretch(0, 2)) is True  # 5 of 10 are left
    assert valid(stretch(1, 3)) is False  # 2 of 10
    assert valid(stretch(1, 3), visible=0.2) is True
    # Each share counts by itself.
    assert valid(pixel(0, 0), stretch(0, 2)) is True
    assert valid(pixel(0, 0), stretch(0, 3)) is False


def test_blank_or_silent_pairs_cannot_be_judged():
    layouts = {"image": Layout((2, 2)), "audio": Layout((4,))}
    digit, sound = torch.eye(2)[None], torch.ones(4)
    for image, audio, expected in (
        (digit, sound, True),
        (torch.ones(1, 2, 2), sound, None),
        (digit, torch.zeros(4), None),
    ):
        pair = Sample("hand", 0, {"image": image, "audio": audio}, layouts, 7)
        assert DigitSum("x").still_valid(pair, Removal()) is expected


def test_digit_sum_of_one_modality_cannot_be_judged(digit_sum):
    data = DigitSum(str(digit_sum.root), test_size=5, use=["audio"])
    assert data.still_valid(data.prepared("test")[0], Removal()) is None


def test_digits_need_no_ground_and_no_silence(digit_sum):
    for pair in digit_sum.prepared("test"):
        assert digit_sum.still_valid(pair, Removal()) is True
        assert digit_sum.still_valid(pair, box(0, 0, 32, 32)) is False
        assert digit_sum.still_valid(pair, Removal.of(Region("audio", (0,), pair.layouts["audio"].grid))) is False
        rows = np.flatnonzero((pair.inputs["image"][0] > -1).any(1).numpy())
        assert digit_sum.still_valid(pair, box(0, 0, rows[0], 32) if rows[0] else Removal()) is True


@settings(deadline=None)
@given(st.data(), boxes(32), boxes(32), st.integers(0, 199), st.integers(1, 200))
def test_removing_more_of_a_digit_never_makes_a_label_right_again(digit_sum, data, less, more, start, length):
    pair = data.draw(st.sampled_from(list(digit_sum.prepared("test"))), "pair")
    more |= Removal.of(Region("audio", (start,), (start + length,)))
    for small, large in ((less, less | more), (more, less | more)):
        assert digit_sum.still_valid(pair, small) or not digit_sum.still_valid(pair, large)


# ---------------------------------------------------------------------------------------------------------
# Cost


def test_it_is_cheap_enough_to_be_asked_once_a_question(easy_vqa, digit_sum, samples):
    pair, sound = digit_sum.prepared("test")[0], Region("audio", (50,), (200,))
    asked = samples["test-364-0"]
    for data, sample, removal in (
        (easy_vqa, asked, box(0, 0, 16, 16) | words_removed(asked, "shape")),
        (digit_sum, pair, box(0, 0, 16, 16) | Removal.of(sound)),
    ):
        spent = []
        for _ in range(200):
            start = time.perf_counter()
            data.still_valid(sample, removal)
            spent.append(time.perf_counter() - start)
        print(f"{data.name}: {1e6 * np.median(spent):.0f} microseconds")
        assert np.median(spent) < 1e-3  # 10 to 60 microseconds on an idle core
