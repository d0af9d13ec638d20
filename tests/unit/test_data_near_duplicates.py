"""MinHash and banding."""

import random

import numpy as np
import pytest

from tuneloop.data.near_duplicates import NearDuplicates, band_shape

WORDS = [f"word{number}" for number in range(400)]


def near(folder, threshold=0.8, ngram=3, permutations=128) -> NearDuplicates:
    folder.mkdir(exist_ok=True, parents=True)
    return NearDuplicates(folder, threshold, ngram, permutations)


def sentence(rng: random.Random, length: int = 60) -> list[str]:
    return [rng.choice(WORDS) for _ in range(length)]


def jaccard(one: list[str], other: list[str], ngram: int) -> float:
    first, second = ({tuple(row[i : i + ngram]) for i in range(len(row) - ngram + 1)} for row in (one, other))
    return len(first & second) / len(first | second)


def test_signatures_estimate_the_jaccard_similarity_of_word_ngrams(tmp_path):
    rng, index = random.Random(0), near(tmp_path, permutations=512)
    errors = []
    for changes in range(0, 30, 2):
        one = sentence(rng)
        other = [rng.choice(WORDS) if place < changes else word for place, word in enumerate(one)]
        signatures, _ = index.signatures([" ".join(one), " ".join(other)])
        errors.append((signatures[0] == signatures[1]).mean() - jaccard(one, other, 3))
    assert max(map(abs, errors)) < 0.08  # standard deviation at 512 permutations: at most 0.022
    assert abs(np.mean(errors)) < 0.02
    assert errors[0] == 0.0


def test_shorter_prompts_are_one_shingle_and_spelling_does_not_count(tmp_path):
    index = near(tmp_path, ngram=5)
    signatures, has_words = index.signatures(["Two words", "two  WORDS!", "two birds", "!?", ""])
    assert (signatures[0] == signatures[1]).all()
    assert (signatures[0] != signatures[2]).all()
    assert has_words.tolist() == [True, True, True, False, False]


def test_the_last_ngram_of_a_row_does_not_reach_into_the_next(tmp_path):
    index = near(tmp_path)
    together, _ = index.signatures(["a b c d", "e f g h i"])
    for row, text in enumerate(["a b c d", "e f g h i"]):
        assert (together[row] == index.signatures([text])[0][0]).all()


def test_only_whole_ngrams_count(tmp_path):
    signatures, _ = near(tmp_path).signatures(["a b c", "z b c"])
    assert (signatures[0] != signatures[1]).all()


def test_earlier_batches_are_searched_like_the_own_one(tmp_path):
    rng = random.Random(3)
    texts = [" ".join(rng.choice("abcdef") for _ in range(12)) for _ in range(1_500)]  # many share a band by chance
    dropped = []
    for batch in (1_500, 100, 3):
        index = near(tmp_path / str(batch), threshold=0.5, ngram=2, permutations=16)
        parts = [index.drop(texts[start : start + batch]) for start in range(0, len(texts), batch)]
        dropped.append(np.flatnonzero(np.concatenate(parts)).tolist())
    assert dropped[0] == dropped[1] == dropped[2]
    assert 100 < len(dropped[0]) < 1_400


def test_operators_tell_sums_apart(tmp_path):
    assert near(tmp_path).drop(["3 + 4 =", "3 - 4 =", "3 + 4 ="]).tolist() == [False, False, True]


def test_prompts_without_words_are_never_near_duplicates(tmp_path):
    assert not near(tmp_path).drop(["?", "?", "!"]).any()


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_the_first_stays_whatever_the_batches(tmp_path, batch):
    rng = random.Random(1)
    texts, copies = [], []
    for number in range(100):
        words = sentence(rng)
        family = [words, words, [*words[:30], "changed", *words[31:]], sentence(rng), words]
        texts += [" ".join(member) for member in family]
        copies += [number * 5 + 1, number * 5 + 2, number * 5 + 4]
    index = near(tmp_path)
    dropped = np.concatenate([index.drop(texts[start : start + batch]) for start in range(0, len(texts), batch)])
    assert np.flatnonzero(dropped).tolist() == copies  # one changed word of 60 leaves 55/61 = 0.90 in common


def test_dissimilar_rows_stay(tmp_path):
    rng = random.Random(2)
    texts = []
    for _ in range(200):
        words = sentence(rng)
        # 20 of 60 words changed leave 38/78 = 0.49 in common, well under the threshold of 0.8
        texts += [" ".join(words), " ".join(rng.choice(WORDS) if place < 20 else w for place, w in enumerate(words))]
    assert not near(tmp_path).drop(texts).any()


def test_bands_find_what_is_at_the_threshold():
    for permutations in (8, 64, 128):
        for threshold in (0.3, 0.5, 0.8, 0.9, 0.99, 1.0):
            bands, rows = band_shape(permutations, threshold)
            assert bands * rows <= permutations
            assert rows == 1 or 1 - (1 - threshold**rows) ** bands >= 0.99
    assert band_shape(64, 0.9) == (9, 7)  # 1 - (1 - 0.9^7)^9 = 0.9971; (8, 8) would reach 0.9886
