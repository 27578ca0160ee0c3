"""Tasks: the projection's law, the permutation, and batches as pure functions of their key."""

import pytest
import torch
from conftest import gpicl


def test_projection_entries_have_variance_one_over_n():
    projection, _ = gpicl.draw_task(0, 5, 784, 1000, "cpu")
    assert projection.shape == (1000, 784)
    assert projection.std().item() == pytest.approx(784**-0.5, rel=0.01)
    assert abs(projection.mean().item()) < 4 * 784**-0.5 / 784000**0.5


def test_projection_preserves_distances_and_scale():
    images = torch.randn(30, 784, generator=torch.Generator().manual_seed(0))
    projection, _ = gpicl.draw_task(0, 1, 784, 784, "cpu")
    ratio = torch.pdist(images @ projection.T) / torch.pdist(images)
    assert ratio.mean().item() == pytest.approx(1, abs=0.03)
    assert ratio.std().item() < 0.05                     # theory: 1 / sqrt(2 * 784) = 0.025


def test_fresh_projection_has_the_law_of_the_full_one():
    """Over many draws, A x has covariance X X' / N per output, and outputs are independent."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 5, 50, generator=generator)
    images[0, 3] = images[0, 0]                          # the same image twice: singular Gram
    expected = images[0] @ images[0].T / 50
    coordinates = gpicl.span(images).expand(20000, -1, -1)
    assert coordinates.shape[2] == 5                     # not 50
    x = gpicl.project_afresh(coordinates, gpicl.default_settings(PROJECTION_SIZE=2), generator)
    found = torch.einsum("bip,bjq->pqij", x, x) / len(x)
    assert torch.allclose(found[0, 0], expected, atol=0.05)
    assert torch.allclose(found[1, 1], expected, atol=0.05)
    assert found[0, 1].abs().max() < 0.05
    assert torch.allclose(x[:, 0], x[:, 3], atol=1e-2)   # equal images stay equal
    full = torch.stack([images[0] @ gpicl.draw_task(0, i, 50, 2, "cpu")[0].T for i in range(4000)])
    assert torch.allclose(torch.einsum("bip,bjp->ij", full, full) / 8000, expected, atol=0.08)


def test_wide_projection_has_the_law_of_normal_numbers():
    """What is read is normal, and the inner products vary as those of all 150 outputs do, though
    few numbers stand for the outputs that are not read. Two sequences have nothing in common.
    """
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(1, 5, 5, generator=generator).tril().expand(20, -1, -1)
    settings = gpicl.default_settings(PROJECTION_SIZE=150, READ_SIZE=20)
    K = (coordinates @ coordinates.mT)[0]
    x = torch.stack([gpicl.project_afresh(coordinates, settings, generator) for _ in range(2000)])
    assert x.shape == (2000, 20, 5, 25) and gpicl.outputs_read(settings) == 20
    for p, q in ((0, 0), (19, 19), (0, 1)):              # two of 20 outputs are independent
        found = torch.einsum("abi,abj->ij", x[..., p], x[..., q]) / 40000
        assert torch.allclose(found, K if p == q else 0 * K, atol=0.1 * K.max().item())
    gram = (x @ x.mT / 150).flatten(0, 1)
    variance = (K.diagonal()[:, None] * K.diagonal() + K**2) / 150       # of a Wishart matrix
    assert torch.allclose(gram.mean(0), K, atol=0.01 * K.max().item())
    assert torch.allclose(gram.var(0), variance, atol=0.05 * variance.max().item())
    across = torch.einsum("aip,ajp->ij", x[:, 0, :, :20], x[:, 1, :, :20]) / 40000
    assert across.abs().max() < 0.05 * K.max()
    one, other = (gram.unflatten(0, (2000, 20))[:, i].flatten(1) - K.flatten() for i in (0, 1))
    assert (one.T @ other / 2000).abs().max() < 0.1 * variance.max()
    fourth = (x[..., 0]**4).mean((0, 1)) / (x[..., 0]**2).mean((0, 1))**2
    assert torch.allclose(fourth, torch.full((5,), 3.0), atol=0.3)       # of a normal number


def test_only_a_model_that_compares_images_gets_few_numbers_of_a_wide_projection(blobs, tiny):
    for form, width in ((dict(), 64 + 40), (dict(COMPARE_IMAGES=False), 500),
                        (dict(ARCHITECTURE="lstm"), 500), (dict(PROJECTION_SIZE=203), 203)):
        settings = tiny(**{**dict(PROJECTION_SIZE=500), **form})
        x, y = gpicl.draw_sequences(blobs, 2, settings, ("width",))
        assert x.shape == (2, 12, width)
        assert gpicl.make_model(settings)(x, y).shape == (2, 12, 10)


@pytest.mark.parametrize("size", [32, 200])
def test_every_sequence_gets_a_projection_of_its_own(blobs, tiny, size):
    coordinates = gpicl.span(blobs.x[:12].expand(2, -1, -1))
    settings = tiny(PROJECTION_SIZE=size)
    x = gpicl.project_afresh(coordinates, settings, torch.Generator().manual_seed(0))
    assert not torch.allclose(x[0], x[1], atol=0.1)
    assert not torch.allclose(x[0] @ x[0].mT, x[1] @ x[1].mT, atol=0.1)


@pytest.mark.parametrize("length", [5, 12, 13, 40, 80])
def test_coordinates_keep_the_inner_products(length):
    """Few images or many, even more than there are pixels, or pixels that say nothing."""
    images = torch.randn(2, length, 50, generator=torch.Generator().manual_seed(0))
    images[:, :, 40:] = 0
    coordinates = gpicl.span(images)
    assert coordinates.shape[2] <= 50
    assert torch.allclose(coordinates @ coordinates.mT, images @ images.mT / 50, atol=1e-4)


def test_cholesky_of_singular_matrices_and_where_torch_has_none():
    """One singular matrix is enough for torch to stop: then all of them are made by columns."""
    a = torch.randn(3, 20, 40, generator=torch.Generator().manual_seed(0))
    a[2, 10:] = a[2, :10]
    gram = a @ a.mT
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram)
    lower = gpicl.cholesky(gram)
    assert torch.equal(lower, lower.tril())
    assert torch.allclose(lower @ lower.mT, gram, atol=1e-3)
    assert torch.allclose(lower[:2], torch.linalg.cholesky(gram[:2]), atol=1e-3)
    assert torch.equal(gpicl.cholesky(gram[:2]), torch.linalg.cholesky(gram[:2], upper=True).mT)
    assert torch.equal(gpicl.cholesky(gram[:2].requires_grad_()), torch.linalg.cholesky(gram[:2]))
    by, gradients = torch.randn(20, 20), []              # as the black box's ridge attention needs
    for n in (3, 2):                                     # by columns, by torch
        b = a.clone().requires_grad_()
        (gpicl.cholesky(b[:n] @ b[:n].mT)[:2] * by).sum().backward()
        gradients.append(b.grad[:2])
    assert torch.allclose(*gradients, atol=1e-3)


def test_a_batch_in_bf16_is_nearly_that_in_fp32(blobs, tiny):
    before = torch.backends.mkldnn.matmul.fp32_precision
    (x, y), (rounded, same) = (gpicl.training_batch(blobs, 0, tiny(), precision)
                               for precision in ("fp32", "bf16"))
    assert torch.equal(y, same) and (rounded - x).norm() < 0.02 * x.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == before       # for all else as it was


def test_rho_is_a_permutation_of_the_labels(blobs, tiny):
    settings = tiny(NUM_EXAMPLES=100)
    for num_tasks in (0, 4):
        _, y = gpicl.draw_sequences(blobs, 6, settings, ("k",), num_tasks)
        chosen = gpicl.draw_images(blobs, 6, 100, gpicl.stream("cpu", "k"))
        for labels, images in zip(y, chosen):
            pairs = set(zip(blobs.y[images].tolist(), labels.tolist()))
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 10


@pytest.mark.parametrize("num_tasks, different", [(0, 20), (4, 4), (2**20, 20)])
def test_every_sequence_has_a_permutation_of_its_own(num_tasks, different, blobs, tiny):
    _, y = gpicl.draw_sequences(blobs, 20, tiny(NUM_EXAMPLES=100), ("k",), num_tasks)
    kinds = blobs.y[gpicl.draw_images(blobs, 20, 100, gpicl.stream("cpu", "k"))]
    assert len({tuple(a[b == c][0].item() for c in range(10))
                for a, b in zip(y, kinds)}) == different


def test_task_i_is_always_the_same_task(blobs, tiny):
    first, again = (gpicl.draw_task(3, 17, 40, 8, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], gpicl.draw_task(3, 18, 40, 8, "cpu")[0])
    assert not torch.equal(first[0], gpicl.draw_task(4, 17, 40, 8, "cpu")[0])
    settings, seen = tiny(NUM_EXAMPLES=30), {}           # across steps: one image, one projection
    for step in range(6):
        key = ("train", 0, step)
        x, y = gpicl.draw_sequences(blobs, 20, settings, key, num_tasks=1)
        chosen = gpicl.draw_images(blobs, 20, 30, gpicl.stream("cpu", *key))
        for image, projected, label in zip(chosen.flatten().tolist(), x.flatten(0, 1),
                                           y.flatten().tolist()):
            former = seen.setdefault(image, (projected, label))
            assert torch.allclose(former[0], projected, atol=1e-5) and former[1] == label
    assert len(seen) > 500                               # fresh images at every step


def test_a_batch_is_a_pure_function_of_seed_and_step(blobs, tiny):
    def batch(*key):
        return gpicl.draw_sequences(blobs, 4, tiny(), key)
    torch.manual_seed(1)
    x, y = batch("train", 0, 7)
    torch.manual_seed(2)
    again_x, again_y = batch("train", 0, 7)
    assert torch.equal(x, again_x) and torch.equal(y, again_y)
    for other in (("train", 0, 8), ("train", 1, 7), ("meta-test", 0, 7)):
        assert not torch.equal(x, batch(*other)[0])


def test_no_image_twice_within_a_sequence(blobs):
    chosen = gpicl.draw_images(blobs, 50, 100, gpicl.stream("cpu", 0))
    assert chosen.shape == (50, 100)
    assert all(len(set(row.tolist())) == 100 for row in chosen)


@pytest.mark.parametrize("num_tasks", [0, 64])
def test_biased_fraction_shares_one_permutation(num_tasks, blobs, tiny):
    settings = tiny(NUM_EXAMPLES=50)
    _, y = gpicl.draw_sequences(blobs, 10, settings, ("k",), num_tasks, biased=0.9)
    chosen = gpicl.draw_images(blobs, 10, 50, gpicl.stream("cpu", "k"))
    same = (y == blobs.y[chosen]).all(1)
    assert same[:9].all() and not same[9]


def test_merged_tasks_have_fewer_classes_the_others_keep_theirs(blobs, tiny):
    """What two examples of one class share, they share after merging; nothing else has changed."""
    settings = tiny(NUM_EXAMPLES=100)
    x, plain = gpicl.draw_sequences(blobs, 200, settings, ("k",))
    again, merged = gpicl.draw_sequences(blobs, 200, settings, ("k",), merged=0.75)
    assert torch.equal(x, again) and torch.equal(plain[:50], merged[:50])
    counts = torch.tensor([len(row.unique()) for row in merged[50:]])
    assert counts.max() < 10 and {*range(2, 8)} < {*counts.tolist()}
    for before, after in zip(plain[50:], merged[50:]):
        assert len({*zip(before.tolist(), after.tolist())}) == len(before.unique())
    assert len({tuple(row.unique().tolist()) for row in merged[50:]}) > 100      # any labels


@pytest.mark.parametrize("num_tasks", [0, 4])
def test_tests_are_neither_biased_nor_merged(num_tasks, blobs, tiny):
    (x, y), (same_x, same_y) = (
        next(gpicl.evaluation_batches(blobs, 8, tiny(**more), num_tasks))
        for more in (dict(), dict(BIASED_FRACTION=1.0, MERGED_FRACTION=1.0)))
    assert torch.equal(x, same_x) and torch.equal(y, same_y)
    every = next(gpicl.evaluation_batches(blobs, 8, tiny(NUM_EXAMPLES=100), num_tasks))[1]
    assert all(len(row.unique()) == 10 for row in every)                 # tests keep ten


def test_fixed_tasks_are_those_of_draw_task_and_of_the_seed(blobs, tiny):
    x, y = gpicl.draw_sequences(blobs, 1, tiny(SEED=3, NUM_EXAMPLES=100), ("k",), num_tasks=1)
    chosen = gpicl.draw_images(blobs, 1, 100, gpicl.stream("cpu", "k"))[0]
    projection, rho = gpicl.draw_task(3, 0, 40, 32, "cpu")
    assert torch.allclose(x[0], blobs.x[chosen] @ projection.T, atol=1e-5)
    assert torch.equal(y[0], rho[blobs.y[chosen]])
    assert len({tuple(gpicl.draw_task(3, i, 40, 8, "cpu")[1].tolist()) for i in range(9)}) == 9


def test_every_image_has_its_turn(blobs):
    few = blobs._replace(y=blobs.y[:23])
    assert len(gpicl.draw_images(few, 100, 12, gpicl.stream("cpu", 0)).unique()) == 23


def test_a_training_batch_follows_seed_tasks_and_biased_fraction(blobs, tiny):
    for change in (dict(SEED=1), dict(NUM_TASKS=4), dict(BIASED_FRACTION=0.5),
                   dict(MERGED_FRACTION=0.6)):
        (x, y), (other_x, other_y) = (gpicl.training_batch(blobs, 0, s, "fp32")
                                      for s in (tiny(), tiny(**change)))
        assert not (torch.equal(x, other_x) and torch.equal(y, other_y)), change
