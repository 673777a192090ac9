"""Reading image and sound files, with one clear error for what is missing or corrupt."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from muroan.errors import MuroanError

SKIP = "fix the file, or set dataset.skip_bad=true to leave such samples out and count them"


def read_image(path: Path) -> PILImage.Image:
    if not path.is_file():
        raise MuroanError(f"image file {path} is missing: {SKIP}")
    try:
        with PILImage.open(path) as image:
            image.load()
            if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip these instead of scaling them
                return PILImage.fromarray(eight_bits(np.asarray(image)))
            return image.copy()
    except Exception as error:  # decoders raise all kinds of errors for broken bytes
        raise MuroanError(f"image file {path} cannot be decoded ({error}): {SKIP}") from None


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Greys of 16 bits, or floats from 0 to 1, as bytes.

    Raises:
        ValueError: other values, of which nothing says what is white.
    """
    low, high = float(values.min()), float(values.max())
    white = 1.0 if np.issubdtype(values.dtype, np.floating) else 65535.0
    if not 0 <= low <= high <= white:
        raise ValueError(f"greys from {low:g} to {high:g}, expected 0 to {white:g}: save it with 8 or 16 bits")
    return np.rint(values / white * 255).astype(np.uint8)


def read_audio(path: Path, rate: int) -> np.ndarray:
    """A WAV file as mono floats in -1 to 1, (samples,), resampled to `rate`."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    if not path.is_file():
        raise MuroanError(f"audio file {path} is missing: {SKIP}")
    try:
        found, wave = wavfile.read(path)
    except Exception as error:  # even ZeroDivisionError and UnboundLocalError
        raise MuroanError(f"audio file {path} cannot be decoded as WAV ({error}): {SKIP}") from None
    if wave.size == 0:
        raise MuroanError(f"audio file {path} holds no samples: {SKIP}")
    if found <= 0:
        raise MuroanError(f"audio file {path} says {found} samples a second: {SKIP}")
    if wave.dtype == np.uint8:
        wave = (wave.astype(np.float32) - 128) / 128
    elif np.issubdtype(wave.dtype, np.integer):
        wave = wave.astype(np.float32) / -float(np.iinfo(wave.dtype).min)
    wave = wave.astype(np.float32)
    if wave.ndim == 2:
        wave = wave.mean(1)
    if found != rate:
        ratio = Fraction(rate, found)
        wave = resample_poly(wave, ratio.numerator, ratio.denominator).astype(np.float32)
    return wave
