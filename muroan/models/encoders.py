"""Encoders of single modalities, trained from scratch.

An encoder is built from its modality (its input's shape, vocabulary or sampling rate) and numbers. Whatever it
reads, it returns `TokenFeatures`, so that any encoder goes with any fusion; `width` is its D.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Modality, Text
from muroan.models.transformer import Block

# Tokens (B, N, D) and mask (B, N) bool, True where a token is real: what encoders return and fusions take.
TokenFeatures = tuple[Tensor, Tensor]


def check_modality(encoder: nn.Module, modality: Modality, expected: type[Modality]) -> None:
    if not isinstance(modality, expected):
        raise MuroanError(
            f"{type(encoder).__name__} encodes {expected.__name__}, got {type(modality).__name__}: "
            "choose another encoder in model.encoders"
        )


def pooling_matrix(inputs: int, outputs: int) -> Tensor:
    """(outputs, inputs) averages that cut a line into equal stretches, as adaptive average pooling does.

    A matrix product instead of the pooling layer, because that layer's gradient is not deterministic on CUDA.

    >>> pooling_matrix(4, 2).tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    return F.adaptive_avg_pool1d(torch.eye(inputs), outputs).T.contiguous()


class ConvGrid(nn.Module):
    """A three-layer CNN, its map averaged to a small grid of tokens with learned positions.

    Args:
        channels: C; size: (H, W) of the input; grid: (h, w) of the tokens; width: D of a token.

    Batch normalisation and max pooling are what makes it learn shapes from a few thousand pictures: with normalisation
    within the sample, or strides, it took several times as many. In eval the rows of a batch are independent.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, channels: int, size: tuple[int, int], grid: tuple[int, int], width: int):
        super().__init__()
        sides = list(grid) if isinstance(grid, Iterable) else []
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise MuroanError(
                f"the grid of {type(self).__name__} must be two whole numbers of tokens, such as [4,4], got {grid!r}"
            )
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((channels, width // 8, width // 4, width)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
            layers += [nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()]  # the same the other way round, and slower
        self.layers = nn.Sequential(*layers)
        height, breadth = (math.ceil(side / 8) for side in size)
        self.register_buffer("rows", pooling_matrix(height, grid[0]), persistent=False)
        self.register_buffer("columns", pooling_matrix(breadth, grid[1]).T.contiguous(), persistent=False)
        self.position = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> TokenFeatures:
        """
        Args:
            x: (B, C, H, W).

        Returns:
            (B, h*w, D) tokens, all real.
        """
        # Stored pixel by pixel, which is faster on a CPU; `contiguous` would leave a single channel as it is.
        pixels = x.movedim(1, -1)
        if x.stride(1) != 1 or not pixels.is_contiguous():
            x = pixels.clone(memory_format=torch.contiguous_format).movedim(-1, 1)
        x = self.layers(x)  # (B, D, H/8, W/8)
        x = self.rows @ x @ self.columns  # (B, D, h, w)
        x = self.norm(x.flatten(2).transpose(1, 2)) + self.position  # (B, h*w, D)
        return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


class ConvTokens(ConvGrid):
    """An image (B, C, H, W) of any size as a grid of visual tokens, 4 x 4 by default."""

    channels_last = True  # see `MultimodalModel.channels_last`

    def __init__(self, modality: Modality, width: int = 128, grid: tuple[int, int] = (4, 4)):
        check_modality(self, modality, Image)
        assert isinstance(modality, Image)
        super().__init__(modality.shape[0], modality.size, grid, width)
        self.width = width


def mel_filters(bands: int, bins: int, rate: int) -> Tensor:
    """(bands, bins) triangular filters, equally wide on the mel scale, 2595 log10(1 + f/700) (O'Shaughnessy 1987).

    Args:
        bins: frequencies of the spectrum, equally spaced from 0 to `rate`/2.
    """
    highest = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, highest, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0).float()


class AudioConv(ConvGrid):
    """A waveform (B, L) as tokens: a log-mel spectrogram, then the CNN of the images; 2 bands x 8 times by default.

    Silence is an input like any other, so every token is real, also where a short sound was padded.

    Args:
        bands: mel bands; window: seconds of sound in one spectrum, which overlap by half.
    """

    hann: Tensor
    filters: Tensor

    def __init__(
        self,
        modality: Modality,
        width: int = 128,
        grid: tuple[int, int] = (2, 8),
        bands: int = 40,
        window: float = 0.032,
    ):
        check_modality(self, modality, Audio)
        assert isinstance(modality, Audio)
        self.samples = max(16, 2 * round(window * modality.rate / 2))
        frames = modality.length // (self.samples // 2) + 1
        super().__init__(1, (bands, frames), grid, width)
        self.width = width
        self.register_buffer("hann", torch.hann_window(self.samples), persistent=False)
        self.register_buffer("filters", mel_filters(bands, self.samples // 2 + 1, modality.rate), persistent=False)

    def forward(self, x: Tensor) -> TokenFeatures:
        """
        Args:
            x: (B, L) waveforms.
        """
        with torch.autocast(x.device.type, enabled=False):  # a Fourier transform wants full precision
            half = self.samples // 2
            spectrum = torch.stft(
                F.pad(x.float(), (half, half)),
                self.samples,
                hop_length=half,
                window=self.hann.float(),
                center=False,
                normalized=True,
                return_complex=True,
            )  # (B, bins, frames)
            power = spectrum.real.square() + spectrum.imag.square()
            # The floor lies 60 dB under a loud sound; the scale brings silence to -1 and a loud sound to about 1.
            mel = (self.filters.float() @ power + 1e-6).log10() / 3 + 1  # (B, bands, frames)
        return super().forward(mel[:, None].to(self.position.dtype))


class WordEmbedding(nn.Module):
    """Token ids (B, T) as embeddings plus learned positions; ids equal to the padding are masked."""

    def __init__(self, modality: Modality, width: int = 128, dropout: float = 0.0):
        super().__init__()
        check_modality(self, modality, Text)
        assert isinstance(modality, Text)
        self.width, self.pad_id = width, modality.tokenizer.pad_id
        self.word = nn.Embedding(modality.tokenizer.size, width)
        self.position = nn.Parameter(0.02 * torch.randn(modality.max_length, width))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> TokenFeatures:
        """
        Args:
            x: (B, T) ids.

        Returns:
            (B, T, D) tokens; the mask leaves out the padding, and may be empty.
        """
        return self.dropout(self.norm(self.word(x)) + self.position[: x.shape[1]]), x != self.pad_id


class Contextual(nn.Module):
    """An encoder followed by transformer layers, so that each token knows the others of its modality.

    Args:
        embedding: the encoder; layers, heads, dropout: of the transformer.
    """

    def __init__(self, embedding: Any, layers: int, heads: int, dropout: float):
        super().__init__()
        self.width, self.embedding = embedding.width, embedding
        self.channels_last = getattr(embedding, "channels_last", False)
        self.blocks = nn.ModuleList(Block(self.width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, x: Tensor) -> TokenFeatures:
        """
        Args:
            x: (B, *shape) inputs of the modality.

        Returns:
            (B, N, D) tokens and the embedding's mask.
        """
        tokens, mask = self.embedding(x)
        for block in self.blocks:
            tokens = block(tokens, mask)
        return self.norm(tokens), mask


class ConvTransformer(Contextual):
    """`ConvTokens` followed by transformer layers."""

    def __init__(
        self,
        modality: Modality,
        width: int = 128,
        grid: tuple[int, int] = (4, 4),
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__(ConvTokens(modality, width, grid), layers, heads, dropout)


class AudioTransformer(Contextual):
    """`AudioConv` followed by transformer layers; further numbers go to `AudioConv`."""

    def __init__(
        self,
        modality: Modality,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        **numbers: Any,
    ):
        super().__init__(AudioConv(modality, width, **numbers), layers, heads, dropout)


class WordTransformer(Contextual):
    """`WordEmbedding` followed by transformer layers."""

    def __init__(self, modality: Modality, width: int = 128, layers: int = 2, heads: int = 4, dropout: float = 0.0):
        super().__init__(WordEmbedding(modality, width, dropout), layers, heads, dropout)
