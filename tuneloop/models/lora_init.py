"""Where the A factor of an adapter starts. B starts at zero, so that every choice leaves the model's function alone.

All choices give A's rows the same expected squared norm, 1/3, which is that of Kaiming's uniform bound 1/sqrt(in):
a learning rate that suits one suits the others.

Legend: R rank, I a matrix's inputs.
"""

import math

import torch

OVERSAMPLING, ITERATIONS = 8, 4  # of the randomised subspace iteration


def initial_a(
    kind: str, weight: torch.Tensor, rank: int, generator: torch.Generator, *, first: int = 0
) -> torch.Tensor:
    """The A factor of shape (R, I) in fp32 on the CPU.

    Args:
        kind: "kaiming" (uniform within 1/sqrt(I), as PEFT and nn.Linear), "gaussian", "orthogonal" (orthogonal rows in
            random directions) or "svd" (the weight's leading right singular vectors: the input directions that the
            layer itself uses most; no data is needed).
        weight: the base weight, shape (out, I).
        rank: rows to make.
        generator: on the CPU; the only source of randomness.
        first: rows that came before, for "svd": the vectors that follow them are returned.
    """
    columns = weight.shape[1]
    if kind == "kaiming":
        bound = 1.0 / math.sqrt(columns)
        return torch.rand(rank, columns, generator=generator).mul_(2 * bound).sub_(bound)
    if kind == "gaussian":
        return torch.randn(rank, columns, generator=generator).mul_(1.0 / math.sqrt(3 * columns))
    if kind == "orthogonal":
        random = torch.randn(columns, rank, generator=generator)
        return torch.linalg.qr(random).Q.T.contiguous().mul_(1.0 / math.sqrt(3))
    assert kind == "svd", kind
    return right_singular_vectors(weight, first + rank, generator)[first:].mul_(1.0 / math.sqrt(3))


def right_singular_vectors(weight: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """The leading `count` right singular vectors as rows, shape (count, I), in fp32 on the CPU.

    Randomised subspace iteration (Halko, Martinsson & Tropp, 2011, arXiv:0909.4061), re-orthogonalised at each pass;
    the sign of a vector is fixed by its largest entry.
    """
    matrix = weight.detach().float()
    size = min(count + OVERSAMPLING, *matrix.shape)
    basis = torch.randn(matrix.shape[1], size, generator=generator).to(matrix.device)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(matrix @ basis).Q
        basis = torch.linalg.qr(matrix.T @ left).Q
    left = torch.linalg.qr(matrix @ basis).Q
    vectors = torch.linalg.svd(left.T @ matrix, full_matrices=False).Vh[:count]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return (vectors * largest.sign()).cpu()
