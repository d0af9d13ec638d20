"""Near-duplicate removal: MinHash over word n-grams, with banding (Broder, 1997; Leskovec et al., ch. 3).

Two rows' signatures agree in an expected share of places equal to the Jaccard similarity of their sets of n-grams.
Rows that agree in a whole band of places are compared; the first of two that are too similar stays. Signatures and
band tables are scratch files of about 0.7 KB a kept row at 64 permutations.

Legend: _N rows of a batch, _S shingles (n-grams) of a batch, _P permutations, _B bands.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tuneloop.data.scratch import GrowingArray, HashTable

_TOKEN = re.compile(r"\w+|[+\-*/=<>^%]")  # words and operators: "3 + 4" is not "3 - 4"
_BUCKET_DEPTH = 128  # most recent rows of a bucket that are compared: bounds the time spent on boilerplate
_RECALL = 0.99
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class NearDuplicates:
    """Remembers the rows that stayed, and tells which new ones are too similar to one of them.

    Args:
        folder: where the scratch files go.
        threshold: estimated Jaccard similarity from which two rows count as one.
        ngram: words of a shingle; a shorter prompt is one shingle.
        permutations: length of a signature.
        seed: of the hash functions.
    """

    def __init__(self, folder: Path, threshold: float, ngram: int, permutations: int, seed: int = 0):
        self._threshold, self._ngram, self._permutations = threshold, ngram, permutations
        self.bands, self.rows_a_band = band_shape(permutations, threshold)
        rng = np.random.default_rng([seed, permutations])
        self._factors_P = rng.integers(0, 2**64, permutations, np.uint64) | np.uint64(1)
        self._offsets_P = rng.integers(0, 2**64, permutations, np.uint64)
        self._signatures = GrowingArray(folder / "signatures", np.uint32, permutations)
        self._links = GrowingArray(folder / "links", np.int32, self.bands)  # row -> the row before it in each bucket
        self._heads = HashTable(folder, "bands", words=1)  # band -> 1 + its most recent row
        self._count = 0

    def drop(self, texts: Sequence[str]) -> np.ndarray:
        """Which of the next rows repeat an earlier one; the others are remembered.

        Args:
            texts: (N,) prompts.

        Returns:
            (N,) bool, True where the row is a near-duplicate of an earlier row that stayed.
        """
        signatures_NP, has_words_N = self.signatures(texts)
        bands_NB = self._band_keys(signatures_NP)
        dropped_N = self._similar_to_earlier(signatures_NP, bands_NB) & has_words_N
        candidates = np.flatnonzero(has_words_N & ~dropped_N)
        stay = self._first_of_batch(signatures_NP[candidates], bands_NB[candidates])
        dropped_N[candidates[~stay]] = True
        self._remember(signatures_NP[candidates[stay]], bands_NB[candidates[stay]])
        return dropped_N

    def signatures(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """MinHash signatures (N, P) uint32, and which rows (N,) have any words."""
        shingles_S, starts_N, has_words_N = _shingles(texts, self._ngram)
        signatures_NP = np.zeros((len(texts), self._permutations), np.uint32)
        if len(shingles_S):
            for column, (factor, offset) in enumerate(zip(self._factors_P, self._offsets_P, strict=True)):
                hashed_S = ((shingles_S * factor + offset) >> np.uint64(32)).astype(np.uint32)
                signatures_NP[has_words_N, column] = np.minimum.reduceat(hashed_S, starts_N)
        return signatures_NP, has_words_N

    def _band_keys(self, signatures_NP: np.ndarray) -> np.ndarray:
        """One 64-bit key a (row, band); the band's number is mixed in, so that one table serves all bands."""
        used = self.bands * self.rows_a_band
        places = signatures_NP[:, :used].reshape(len(signatures_NP), self.bands, self.rows_a_band).astype(np.uint64)
        keys_NB = np.broadcast_to(np.arange(1, self.bands + 1, dtype=np.uint64), places.shape[:2]).copy()
        for place in range(self.rows_a_band):
            keys_NB = _mix(keys_NB * _MULTIPLIER + places[:, :, place])
        return keys_NB

    def _similar_to_earlier(self, signatures_NP: np.ndarray, bands_NB: np.ndarray) -> np.ndarray:
        found_N = np.zeros(len(signatures_NP), bool)
        entry_NB = self._heads.find(bands_NB.reshape(-1, 1)).reshape(bands_NB.shape)
        for _ in range(_BUCKET_DEPTH):
            entry_NB[found_N] = 0
            row, band = np.nonzero(entry_NB)
            if not len(row):
                break
            earlier = entry_NB[row, band] - 1
            same = (self._signatures.data[earlier] == signatures_NP[row]).mean(axis=1)
            found_N[row[same >= self._threshold]] = True
            entry_NB[row, band] = self._links.data[earlier, band]
        return found_N

    def _first_of_batch(self, signatures_NP: np.ndarray, bands_NB: np.ndarray) -> np.ndarray:
        """Which rows stay when only this batch is looked at: each is compared with those before it that stay."""
        stay = np.ones(len(signatures_NP), bool)
        buckets: dict[int, list[int]] = {}
        for row, keys in enumerate(bands_NB.tolist()):
            near = sorted({other for key in keys for other in buckets.get(key, ())[-_BUCKET_DEPTH:]})
            if near:
                same = (signatures_NP[near] == signatures_NP[row]).mean(axis=1)
                stay[row] = not (same >= self._threshold).any()
            if stay[row]:
                for key in keys:
                    buckets.setdefault(key, []).append(row)
        return stay

    def _remember(self, signatures_NP: np.ndarray, bands_NB: np.ndarray) -> None:
        count = len(signatures_NP)
        if not count:
            return
        first, self._count = self._count, self._count + count
        self._signatures.reserve(self._count)
        self._links.reserve(self._count)
        self._signatures.data[first : self._count] = signatures_NP
        slots = self._heads.insert(bands_NB.reshape(-1, 1))[0].reshape(bands_NB.shape)
        for band in range(self.bands):
            # Within a batch, rows of one bucket link to each other in order; the last becomes the head.
            order = np.argsort(slots[:, band], kind="stable")
            bucket, rows = slots[order, band], order + first + 1
            begins = np.r_[True, bucket[1:] != bucket[:-1]]
            previous = np.where(begins, self._heads.values[bucket], np.r_[0, rows[:-1]])
            self._links.data[rows - 1, band] = previous
            ends = np.r_[begins[1:], True]
            self._heads.values[bucket[ends]] = rows[ends]


def band_shape(permutations: int, threshold: float) -> tuple[int, int]:
    """(bands, places a band): the most selective bands that still meet at `threshold` with a chance of 99 %.

    Two rows of similarity s share one of b bands of r places with probability `1 - (1 - s^r)^b`.
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1.0 - (1.0 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return permutations, 1


def _shingles(texts: Sequence[str], ngram: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of all n-grams (S,), where each row with words begins among them, and which rows have words (N,)."""
    words = [_TOKEN.findall(text.casefold()) for text in texts]
    count_N = np.array([len(row) for row in words])
    hashes = _word_hashes([word for row in words for word in row])
    has_words_N = count_N > 0
    if not len(hashes):
        return hashes, np.zeros(0, int), has_words_N
    ends = np.repeat(np.cumsum(count_N), count_N)
    place = np.arange(len(hashes))
    rolled = np.zeros(len(hashes), np.uint64)
    for step in range(ngram):
        inside = place + step < ends
        following = hashes[np.where(inside, place + step, 0)]
        rolled = np.where(inside, rolled * _MULTIPLIER + following, rolled)
    # The tails of a row are shorter than n words: only a row that is shorter itself keeps its first one.
    starts = np.repeat(np.cumsum(count_N) - count_N, count_N)
    whole = (place + ngram <= ends) | (place == starts)
    shingle_counts = np.add.reduceat(whole.astype(np.int64), (np.cumsum(count_N) - count_N)[has_words_N])
    return _mix(rolled[whole]), np.r_[0, np.cumsum(shingle_counts)[:-1]], has_words_N


def _word_hashes(words: list[str]) -> np.ndarray:
    """One 64-bit hash a word, equal in every process (Python's own is salted)."""
    encoded = [word.encode() for word in words]
    if not encoded:
        return np.zeros(0, np.uint64)
    lengths = np.array([len(word) for word in encoded])
    letters = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint64) + np.uint64(1)
    begins = np.cumsum(lengths) - lengths
    place = np.arange(len(letters)) - np.repeat(begins, lengths)
    with np.errstate(over="ignore"):
        weights = np.cumprod(np.full(int(lengths.max()), _MULTIPLIER, np.uint64))
        return _mix(np.add.reduceat(letters * weights[place], begins))


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
