import numpy as np
import pytest
import torch

from replaceme.base.documents import Documents
from replaceme.base.errors import SolveError
from replaceme.base.parameters import read_params
from replaceme.methods.registry import METHODS
from replaceme.solvers.ridge import solve_ridge
from replaceme.statistics.cut_statistics import take_statistics
from replaceme.statistics.sums import ROUNDING_RIDGE, Sums, gram_format, squares
from tests.conftest import WIDTH, made_model
from tests.helpers import context_of
from tests.statistics.helpers import BLOCK, at_cut

NAMES = ("gram", "sample")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_transform_from_the_statistics_equals_numpy_lstsq_on_the_activations(documents: Documents, batch_size: int) -> None:
    model = made_model(dtype=torch.float64)
    sums = take_statistics(context_of(model, documents, batch_size), BLOCK, NAMES)["gram"]
    M, Z, H = at_cut(model, documents)
    expected = np.linalg.lstsq(M, H - Z, rcond=None)[0]
    assert np.allclose(solve_ridge(sums["gram"], sums["cross"], 0.0).transform.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_sums_equal_those_of_the_concatenated_activations(documents: Documents) -> None:
    model = made_model(dtype=torch.float64)
    sums = take_statistics(context_of(model, documents), BLOCK, NAMES)["gram"]
    M, Z, H = at_cut(model, documents)
    expected = {
        "gram": M.T @ M, "cross": M.T @ (H - Z), "target_squares": ((H - Z) ** 2).sum(), "output_squares": (H**2).sum(),
        "gap_squares": ((H - Z - M) ** 2).sum(), "tokens": len(M),
    }  # fmt: skip
    assert all(np.allclose(sums[name].numpy(), value, rtol=1e-10) for name, value in expected.items())
    assert all(total.dtype == torch.float64 for total in sums.values())


def test_the_sample_holds_evenly_spaced_real_tokens(documents: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replaceme.statistics.cut_statistics.SAMPLED_TOKENS", 50)
    model = made_model(dtype=torch.float64)
    sample = take_statistics(context_of(model, documents), BLOCK, NAMES)["sample"]
    longest_first = Documents(sorted(documents.documents, key=len, reverse=True))
    M, Z, H = at_cut(model, longest_first)
    step = -(-documents.token_count // 50)
    for name, values in (("added", M), ("rest", Z), ("target", H)):
        assert np.allclose(sample[name].numpy(), values[::step], atol=1e-5)


def test_figures_of_the_fit_equal_those_of_the_activations(documents: Documents) -> None:
    model = made_model(dtype=torch.float64)
    taken = take_statistics(context_of(model, documents), BLOCK, NAMES)
    params = read_params(None, {"alpha": 3.0})
    solved = METHODS["lstsq"].solve(params, BLOCK, taken.__getitem__)
    edits, figures = solved.edits, solved.figures
    T = edits.transforms[BLOCK.layer_before_cut].numpy()
    M, Z, H = at_cut(model, documents)
    cosine = ((M @ T + Z) * H).sum(1) / (np.linalg.norm(M @ T + Z, axis=1) * np.linalg.norm(H, axis=1))
    eigenvalues = np.linalg.eigvalsh(M.T @ M)
    plain = np.linalg.lstsq(M, H - Z, rcond=None)[0]
    expected = {
        "tokens": len(M),
        "relative_residual": np.linalg.norm(H - Z - M @ T) / np.linalg.norm(H),
        "relative_residual_removed": np.linalg.norm(H - Z - M) / np.linalg.norm(H),
        "mean_cosine": cosine.mean(),
        "mean_cosine_removed": (((M + Z) * H).sum(1) / (np.linalg.norm(M + Z, axis=1) * np.linalg.norm(H, axis=1))).mean(),
        "condition_number": (eigenvalues[-1] + 3) / (eigenvalues[0] + 3),
        "smallest_eigenvalue": eigenvalues[0],
        "alpha_over_smallest_eigenvalue": 3 / eigenvalues[0],
        "distance_from_identity": np.linalg.norm(T - np.eye(WIDTH)) / WIDTH**0.5,
        "distance_from_alpha_zero": np.linalg.norm(T - plain) / np.linalg.norm(plain),
    }
    path = dict(solved.ridge_path)
    alpha = sorted(path)[20]
    other = METHODS["lstsq"].solve(read_params(None, {"alpha": alpha}), BLOCK, taken.__getitem__)
    assert path[alpha] == pytest.approx(other.figures["relative_residual"], rel=1e-8)
    assert figures == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("transform", ["diagonal", "triangular", "two_vectors"])
def test_a_structured_transform_has_the_same_figures_and_a_title_that_names_it(documents: Documents, transform: str) -> None:
    model = made_model(dtype=torch.float64)
    taken = take_statistics(context_of(model, documents), BLOCK, NAMES)
    params = read_params(None, {"alpha": 3.0, "transform": transform})
    dense, solved = (
        METHODS["lstsq"].solve(each, BLOCK, taken.__getitem__) for each in (read_params(None, {"alpha": 3.0}), params)
    )
    assert solved.figures.keys() == dense.figures.keys()
    assert solved.edits.title == f"ReplaceMe (least squares, {transform.replace('_', ' ')})"
    T = solved.edits.transforms[BLOCK.layer_before_cut].numpy()
    M, Z, H = at_cut(model, documents)
    assert solved.figures["relative_residual"] == pytest.approx(np.linalg.norm(H - Z - M @ T) / np.linalg.norm(H))
    assert solved.figures["condition_number"] == pytest.approx(dense.figures["condition_number"])


@pytest.mark.parametrize("width", [1, 5, 6, 7, 13, 64])
def test_squares_are_the_gram_matrix(width: int) -> None:
    x = torch.randn(20, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    product = squares(x)
    assert torch.allclose(product, x.T @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("states", "ridge", "products"),
    [
        (torch.bfloat16, 0.3, torch.bfloat16), (torch.bfloat16, 0.1, torch.float32), (torch.bfloat16, 0.0, torch.float32),
        (torch.float16, 1.0, torch.float32), (torch.float32, 1.0, torch.float32), (torch.float64, 1.0, torch.float32),
    ],
)  # fmt: skip
def test_products_are_rounded_to_bfloat16_beside_a_ridge_alone_where_they_are_fast(
    states: torch.dtype, ridge: float, products: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = torch.device("cpu")
    monkeypatch.setattr("replaceme.statistics.sums.multiplies_bfloat16", lambda _: True)
    assert gram_format(states, processor, ridge) == products
    monkeypatch.setattr("replaceme.statistics.sums.multiplies_bfloat16", lambda _: False)
    assert gram_format(states, processor, ridge) == torch.float32


def test_a_ridge_hides_the_rounding_of_products_to_bfloat16() -> None:
    chance = torch.Generator().manual_seed(0)
    # Columns of very different sizes, with a common part, as an MLP's.
    x = torch.rand(900, 200, generator=chance) * torch.logspace(-3, 4, 200)
    sums, rounded = Sums(), Sums()
    for part in x.split(100):
        sums.add_squares("gram", part)
        rounded.add_squares("gram", part.bfloat16())
    exact, found = (each.take_totals()["gram"] for each in (sums, rounded))
    scale = exact.diagonal().rsqrt()
    assert 0 < float(torch.linalg.matrix_norm((found - exact) * scale * scale[:, None], 2)) < 0.1 * ROUNDING_RIDGE
    assert float(torch.linalg.eigvalsh(found * scale * scale[:, None]).min()) > -0.1 * ROUNDING_RIDGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_those_of_all_parts_in_float64(dtype: torch.dtype) -> None:
    rows, sums = torch.randn(60, 13, dtype=dtype, generator=torch.Generator().manual_seed(0)), Sums()
    for part in rows.split(20):
        sums.add_squares("gram", part)
        sums.add({"column": part.sum(dim=0), "squares": part.square().sum()})
    found = sums.take_totals()
    exact = rows.double()
    expected = {"gram": exact.T @ exact, "column": exact.sum(dim=0), "squares": exact.square().sum()}
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        assert found[name].dtype == torch.float64
        assert torch.allclose(found[name], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gram", "features", "mlp_features", "stream", "stream_weighted", "magnitudes"])
def test_sums_that_are_not_finite_are_refused_before_they_are_stored(name: str, documents: Documents) -> None:
    model = made_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[int(documents.documents[0][3])] = float("nan")
    with pytest.raises(SolveError, match="dtype: the sums over the activations are not finite; use float32 or bfloat16"):
        take_statistics(context_of(model, documents), BLOCK, [name])
