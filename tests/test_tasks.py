"""Tasks: the projection's law, the permutation, and batches as pure functions of their key."""

import pytest
import torch
from conftest import gpicl, train


def images_and_labels(dataset, n_sequences, length, *key):
    """Return indices of the images that draw_sequences draws for this key."""
    return gpicl.draw_images(dataset, n_sequences, length, gpicl.random_stream("cpu", *key))


# ----------------------------------------------------------------------------------- projections
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


@pytest.mark.parametrize("length", [5, 20, 60])
def test_fresh_projection_has_the_law_of_a_gaussian_matrix(length):
    """Few images or many, even more than pixels: A x has covariance X X' / N in every output, two
    outputs are independent, and inner products vary as those of a Wishart matrix do.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, length, 50, generator=generator)
    images[0, 3] = images[0, 0]                          # the same image twice
    K = images[0] @ images[0].T / 50
    x = torch.cat([gpicl.random_projection(images.expand(1000, -1, -1), 30, generator)
                   for _ in range(8)])
    assert x.shape == (8000, length, 30)
    largest = K.max().item()
    for p, q in ((0, 0), (29, 29), (0, 1)):
        covariance = torch.einsum("bi,bj->ij", x[..., p], x[..., q]) / len(x)
        assert torch.allclose(covariance, K if p == q else 0 * K, atol=0.08 * largest)
    products = x @ x.mT / 30
    variance = (K.diagonal()[:, None] * K.diagonal() + K**2) / 30
    assert torch.allclose(products.mean(0), K, atol=0.015 * largest)
    assert torch.allclose(products.var(0), variance, atol=0.1 * variance.max().item())
    fourth = (x[:, 1]**4).mean() / (x[:, 1]**2).mean()**2
    assert fourth.item() == pytest.approx(3, abs=0.1)    # of normal numbers
    assert torch.allclose(x[:, 0], x[:, 3], atol=0.03)   # equal images stay equal


@pytest.mark.parametrize("kinds", [1, 3])
def test_images_that_repeat_can_be_projected(kinds):
    images = torch.randn(2, kinds, 784)[:, torch.arange(100) % kinds]
    x = gpicl.random_projection(images, 50, torch.Generator().manual_seed(0))
    assert x.isfinite().all()
    assert (x[:, kinds:] - x[:, :-kinds]).abs().max() < 0.05
    assert kinds == 1 or (x[:, 1:] - x[:, :-1]).abs().max() > 0.5


@pytest.mark.parametrize("pixels", [40, 400])
def test_every_sequence_gets_a_projection_of_its_own(pixels):
    images = torch.randn(1, 12, pixels).expand(2, -1, -1)
    x = gpicl.random_projection(images, 32, torch.Generator().manual_seed(0))
    assert not torch.allclose(x[0] @ x[0].mT, x[1] @ x[1].mT, atol=1)


# ------------------------------------------------------------------------------------ fixed tasks
def test_task_i_is_always_the_same_task(blobs, tiny):
    first, again = (gpicl.draw_task(3, 17, 40, 8, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], gpicl.draw_task(3, 18, 40, 8, "cpu")[0])
    assert not torch.equal(first[0], gpicl.draw_task(4, 17, 40, 8, "cpu")[0])
    seen = {}                                            # across steps: one image, one projection
    for step in range(6):
        key = ("train", 0, step)
        x, y = gpicl.draw_sequences(blobs, 20, tiny(NUM_EXAMPLES=30), key, num_tasks=1)
        chosen = images_and_labels(blobs, 20, 30, *key)
        for image, projected, label in zip(chosen.flatten().tolist(), x.flatten(0, 1),
                                           y.flatten().tolist()):
            former = seen.setdefault(image, (projected, label))
            assert torch.allclose(former[0], projected, atol=1e-5) and former[1] == label
    assert len(seen) > 500                               # fresh images at every step


def test_fixed_tasks_are_those_of_draw_task_and_of_the_seed(blobs, tiny):
    x, y = gpicl.draw_sequences(blobs, 1, tiny(SEED=3, NUM_EXAMPLES=100), ("k",), num_tasks=1)
    chosen = images_and_labels(blobs, 1, 100, "k")[0]
    projection, rho = gpicl.draw_task(3, 0, 40, 32, "cpu")
    assert torch.allclose(x[0], blobs.x[chosen] @ projection.T, atol=1e-5)
    assert torch.equal(y[0], rho[blobs.y[chosen]])
    assert len({tuple(gpicl.draw_task(3, i, 40, 8, "cpu")[1].tolist()) for i in range(9)}) == 9


# ----------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("num_tasks", [0, 4])
def test_rho_is_a_permutation_of_the_labels(num_tasks, blobs, tiny):
    _, y = gpicl.draw_sequences(blobs, 6, tiny(NUM_EXAMPLES=100), ("k",), num_tasks)
    for labels, images in zip(y, images_and_labels(blobs, 6, 100, "k")):
        pairs = set(zip(blobs.y[images].tolist(), labels.tolist()))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 10


@pytest.mark.parametrize("num_tasks, different", [(0, 20), (4, 4), (2**20, 20)])
def test_sequences_have_as_many_permutations_as_there_are_tasks(num_tasks, different, blobs, tiny):
    _, y = gpicl.draw_sequences(blobs, 20, tiny(NUM_EXAMPLES=100), ("k",), num_tasks)
    classes = blobs.y[images_and_labels(blobs, 20, 100, "k")]
    assert len({tuple(a[b == c][0].item() for c in range(10))
                for a, b in zip(y, classes)}) == different


@pytest.mark.parametrize("num_tasks", [0, 64])
def test_the_biased_share_has_one_permutation(num_tasks, blobs, tiny):
    _, y = gpicl.draw_sequences(blobs, 10, tiny(NUM_EXAMPLES=50), ("k",), num_tasks, biased=0.9)
    same = (y == blobs.y[images_and_labels(blobs, 10, 50, "k")]).all(1)
    assert same[:9].all() and not same[9]


def test_the_merged_share_has_fewer_classes_the_others_keep_theirs(blobs, tiny):
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


# ----------------------------------------------------------------------------------------- images
def test_no_image_twice_within_a_sequence(blobs):
    chosen = gpicl.draw_images(blobs, 50, 100, gpicl.random_stream("cpu", 0))
    assert chosen.shape == (50, 100)
    assert all(len(set(row.tolist())) == 100 for row in chosen)


def test_every_image_has_its_turn(blobs):
    few = blobs._replace(y=blobs.y[:23])
    assert len(gpicl.draw_images(few, 100, 12, gpicl.random_stream("cpu", 0)).unique()) == 23


# ---------------------------------------------------------------------------------------- batches
def test_a_batch_is_a_pure_function_of_its_key(blobs, tiny):
    def batch(*key):
        return gpicl.draw_sequences(blobs, 4, tiny(), key)
    torch.manual_seed(1)
    x, y = batch("train", 0, 7)
    torch.manual_seed(2)
    again_x, again_y = batch("train", 0, 7)
    assert torch.equal(x, again_x) and torch.equal(y, again_y)
    for other in (("train", 0, 8), ("train", 1, 7), ("meta-test", 0, 7)):
        assert not torch.equal(x, batch(*other)[0])


def training_batches(settings, dataset, monkeypatch):
    """Return the batches (x, y) that training on a data set learns from."""
    batches = []
    with monkeypatch.context() as patch:
        patch.setattr(gpicl, "train_step", lambda model, optimizers, x, y, *_: batches.append(
            (x, y)) or 0.0)
        train(gpicl.make_model(settings), dataset, settings)
    return batches


def test_every_step_has_a_batch_of_its_own(blobs, tiny, monkeypatch):
    batches = training_batches(tiny(), blobs, monkeypatch)
    assert len(batches) == 6 and all(x.shape == (8, 12, 32) for x, _ in batches)
    assert len({x.sum().item() for x, _ in batches}) == 6


def test_training_follows_seed_tasks_and_shares(blobs, tiny, monkeypatch):
    x, y = training_batches(tiny(), blobs, monkeypatch)[0]
    for change in (dict(SEED=1), dict(NUM_TASKS=4), dict(BIASED_FRACTION=0.5),
                   dict(MERGED_FRACTION=0.6)):
        other_x, other_y = training_batches(tiny(**change), blobs, monkeypatch)[0]
        assert not (torch.equal(x, other_x) and torch.equal(y, other_y)), change


@pytest.mark.parametrize("num_tasks", [0, 4])
def test_meta_test_is_neither_biased_nor_merged(num_tasks, blobs, tiny):
    (x, y), (same_x, same_y) = (
        next(gpicl.meta_test_batches(blobs, 8, tiny(NUM_EXAMPLES=100, **more), num_tasks))
        for more in (dict(), dict(BIASED_FRACTION=1.0, MERGED_FRACTION=1.0)))
    assert torch.equal(x, same_x) and torch.equal(y, same_y)
    assert all(len(row.unique()) == 10 for row in y)
