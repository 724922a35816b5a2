"""Likelihoods are exact, in nats per image, and sampling draws from the very same distribution."""

import math

import pytest
import torch
from helpers import AUTOREGRESSIVE, binary, perturb, tiny, trained
from torch.distributions import Bernoulli, Normal, kl_divergence

from made import MADE
from pixelcnn import MaskedConv2d

pytestmark = pytest.mark.usefixtures("float64")
six = pytest.mark.parametrize("name", AUTOREGRESSIVE)


@torch.no_grad()
def slow_sample(model, n, y, top):
    """The definition of sampling: a whole forward pass for each pixel."""
    x = torch.zeros(n, 1, model.size, model.size)
    x[:, :, : top.shape[2]] = torch.bernoulli(top)
    for i in range(top[0].numel(), model.size**2):
        p = model(x, y).flatten(1)[:, i].sigmoid()
        x.view(n, -1)[:, i] = torch.bernoulli(p)
    return x


def jacobian(model):
    """Of all logits with respect to all pixels of a random image -> (H * W, H * W)."""
    x = binary(1, 1, model.size, model.size)
    slopes = torch.autograd.functional.jacobian(lambda x: model(x).flatten(), x)
    return slopes.view(model.size**2, model.size**2)


# ---------------------------------------------------------------- the six autoregressive models
@pytest.mark.parametrize("n_classes", [0, 10])
@six
def test_probabilities_of_all_images_sum_to_one(name, n_classes):
    model = trained(name, size=3, n_classes=n_classes)
    y = torch.full((512,), 7) if n_classes > 0 else None
    x = torch.arange(512)[:, None].bitwise_and(2 ** torch.arange(9)).ne(0).double()  # (512, 9)
    logits = model(x.view(512, 1, 3, 3), y).flatten(1).double()
    p = torch.where(x == 1, logits, -logits).sigmoid().prod(1)
    assert abs(p.sum() - 1) < 1e-6
    assert p.std() > 3e-4


@six
def test_causal_and_nothing_out_of_sight(name):
    """The Jacobian of all logits: 0 at the pixel itself and later, nowhere 0 before."""
    visible = torch.ones(81, 81).tril(-1).bool()
    if name == "pixelcnn":  # but for its blind spot, as its header draws it
        row, col = torch.arange(81) // 9, torch.arange(81) % 9
        up, right = row[:, None] - row, col - col[:, None]
        visible &= (up == 0) | (right <= 2 * up + 1)
        assert (~visible).tril(-1).sum() > 100
    assert torch.equal(jacobian(trained(name, size=9)) != 0, visible)


@pytest.mark.parametrize("name", ["rnn", "made", "wavenet", "transformer"])
def test_last_pixel_sees_the_whole_image(name):
    model = perturb(tiny(name), 0.1)
    x = binary(1, 1, 28, 28).requires_grad_()
    model(x)[0, 0, -1, -1].backward()
    assert x.grad.flatten()[:-1].all()
    assert x.grad.flatten()[-1] == 0


def test_pixelcnn_masks():
    """Of the 25 taps, A has the 12 before the centre, B the centre, too."""
    for kind, taps in ("A", 12), ("B", 13):
        conv = MaskedConv2d(1, 1, 5, kind)
        slopes = torch.autograd.functional.jacobian(conv, torch.zeros(1, 1, 3, 5)).flatten()
        assert slopes.ne(0).tolist() == [True] * taps + [False] * (15 - taps)


def test_made_tells_each_output_of_the_pixel_before_it():
    """Also without the direct weights: no degree may be missing."""
    model = MADE(hidden=80, n_layer=2, size=9)
    for p in model.parameters():  # all positive, so that every ReLU lets pass
        p.data.abs_().add_(0.01)
    model.direct.weight.data.zero_()
    assert jacobian(model).diagonal(-1).all()


@pytest.mark.parametrize("n_classes, rows", [(0, 0), (10, 3)])
@six
def test_fast_sampling_is_slow_sampling(name, n_classes, rows):
    model = trained(name, size=7, n_classes=n_classes)
    y = torch.arange(20) % 10 if n_classes > 0 else None
    top = binary(20, 1, rows, 7)
    torch.manual_seed(1)
    slow = slow_sample(model, 20, y, top)
    torch.manual_seed(1)
    assert torch.equal(model.sample(20, y, top), slow)
    assert 0.02 < slow.mean() < 0.98


@six
def test_top_is_binarised_and_kept(name):
    model = tiny(name, size=8)
    grey = torch.full((9, 1, 3, 8), 0.25)
    images = model.sample(9, top=grey)
    assert ((images == 0) | (images == 1)).all()
    assert 0.1 < images[:, :, :3].mean() < 0.4
    top = binary(9, 1, 3, 8)
    assert torch.equal(model.sample(9, top=top)[:, :, :3], top)
    with pytest.raises(RuntimeError):
        model.sample(9, top=255 * top)


@pytest.mark.parametrize("name", [*AUTOREGRESSIVE, "vqvae"])
def test_logits_from_the_cache_are_those_of_a_whole_pass(name):
    """For each pixel, or code of the VQ-VAE's prior, though the later ones are still unknown."""
    y = torch.tensor([3, 1, 9])
    if name == "vqvae":
        model = perturb(tiny(name, size=16, n_classes=10))
        x = torch.randint(8, (3, 16))
        logits = model.prior(x, y)  # (3, 16, n_codes)
        cache = model.new_cache(3)
    else:
        model = perturb(tiny(name, size=7, n_classes=10)).eval()
        x = binary(3, 1, 7, 7)
        logits = model(x, y).flatten(1)  # (3, 49)
        cache = model.new_cache(x)
    known = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(logits.shape[1]):
            torch.testing.assert_close(model.logits_at(known, y, i, cache), logits[:, i])
            known.view(3, -1)[:, i] = x.view(3, -1)[:, i]
    assert logits.std() > 0.1


@six
def test_nll_is_in_nats_per_image(name):
    model = trained(name, size=8)
    x = binary(5, 1, 8, 8)  # binary images: nothing to draw
    _, metrics = model.loss(x)
    p = model(x).double().sigmoid()
    nll = -torch.where(x == 1, p, 1 - p).log().sum() / 5
    assert metrics["nll"].item() == pytest.approx(nll.item(), rel=1e-4)
    assert metrics["bpd"].item() == pytest.approx(nll.item() / 64 / math.log(2), rel=1e-4)


@six
def test_sampling_shows_half_a_row_more_in_each_frame(name):
    frames = tiny(name, size=8).pictures(binary(12, 1, 8, 8))["sampling"]
    assert frames.shape == (17, 12, 1, 8, 8)
    for i, frame in enumerate(frames):
        pixels = frame.flatten(1)
        assert (pixels[:, : 4 * i] != 0.5).all()
        assert (pixels[:, 4 * i :] == 0.5).all()
        assert torch.equal(pixels[:, : 4 * i], frames[-1].flatten(1)[:, : 4 * i])


@six
def test_completions_keep_the_upper_half(name):
    x = binary(12, 1, 8, 8)
    completion = tiny(name, size=8).pictures(x)["completion"]
    images, upper, *drawn = completion.view(6, 10, 1, 8, 8)
    assert torch.equal(images, x[:10])
    assert (upper[:, :, 4:] == 0.5).all()
    for rows in (upper, *drawn):
        assert torch.equal(rows[:, :, :4], x[:10, :, :4])
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 4


# ---------------------------------------------------------------- vae
def test_vae_loss_is_the_bound_in_nats():
    model = perturb(tiny("vae"), 0.05)
    x = binary(5, 1, 28, 28)
    torch.manual_seed(1)
    _, metrics = model.loss(x)
    torch.manual_seed(1)
    torch.bernoulli(x)  # the binarisation comes first
    logits, mu, logvar = model(x)
    kl = kl_divergence(Normal(mu, logvar.exp().sqrt()), Normal(0, 1)).sum() / 5
    recon = -Bernoulli(logits=logits).log_prob(x).sum() / 5
    assert mu.shape == logvar.shape == (5, 8)
    assert logvar.abs().max() > 0.01
    expected = {"neg_elbo": recon + kl, "recon": recon, "kl": kl}
    torch.testing.assert_close(metrics, expected, rtol=1e-4, atol=1e-4)


def test_vae_bound_is_the_log_of_a_mean_over_draws():
    model = perturb(tiny("vae", size=8, n_classes=10))
    x = binary(6, 1, 8, 8)
    y = torch.arange(6)
    torch.manual_seed(1)
    torch.bernoulli(x)
    mu, logvar = model.encode(x, y)
    q, prior = Normal(mu, logvar.exp().sqrt()), Normal(0, 1)
    log_w = []
    for _ in range(3):
        z = mu + q.stddev * torch.randn_like(mu)
        log_px = Bernoulli(logits=model.decode(z, y)).log_prob(x).sum((1, 2, 3))
        log_w.append(log_px + (prior.log_prob(z) - q.log_prob(z)).sum(1))
    expected = -torch.stack(log_w).exp().mean(0).log().mean()
    torch.manual_seed(1)
    torch.testing.assert_close(model.bound(x, y, k=3), expected)


def test_vae_bound_tends_to_the_likelihood():
    """Which is an integral over z, here over a single number."""
    model = perturb(tiny("vae", size=4, z_dim=1), 0.15)
    x = binary(1, 1, 4, 4)
    z = torch.linspace(-8, 8, 2001)[:, None]
    log_px = Bernoulli(logits=model.decode(z)).log_prob(x).sum((1, 2, 3))
    log_pz = Normal(0, 1).log_prob(z[:, 0])
    nll = -(log_px + log_pz).logsumexp(0) - math.log(16 / 2000)  # 16 / 2000 from z to z
    many = x.expand(200, 1, 4, 4)
    elbo, close, exact = (model.bound(many, k=k) for k in (1, 10, 100))
    assert abs(exact - nll) < 0.01
    assert nll + 0.01 < close < elbo - 0.2


# ---------------------------------------------------------------- vqvae
def random_vqvae(**changes):
    return perturb(tiny("vqvae", **changes)).eval()


def log_prior(model, codes, y=None):
    return model.prior(codes, y).log_softmax(2).gather(2, codes[..., None]).sum((1, 2))


ALL_CODES = torch.arange(81)[:, None] // 3 ** torch.arange(4) % 3  # all maps of 2 x 2 codes below 3


@pytest.mark.parametrize("n_classes", [0, 10])
def test_vqvae_prior_sums_to_one(n_classes):
    model = random_vqvae(n_codes=3, size=8, n_classes=n_classes)
    y = torch.full((81,), 7) if n_classes > 0 else None
    p = log_prior(model, ALL_CODES, y).exp()
    assert abs(p.sum() - 1) < 1e-6
    assert p.std() > 1e-3


def test_vqvae_neg_elbo_bounds_the_likelihood():
    """It counts one map of codes, that of the encoder, where p(x) is a sum over all maps."""
    model = random_vqvae(n_codes=3, size=8)
    x = binary(1, 1, 8, 8)
    logits = model.decode(model.codebook[ALL_CODES])
    log_p = torch.where(x == 1, logits, -logits).sigmoid().log().sum((1, 2, 3))
    log_p = log_p + log_prior(model, ALL_CODES)  # of x and the codes
    mine = (model.quantise(model.encode(x)) == ALL_CODES).all(1)
    neg_elbo = model.loss(x)[1]["neg_elbo"]
    torch.testing.assert_close(neg_elbo, -log_p[mine][0], check_dtype=False)
    assert neg_elbo > -log_p.logsumexp(0)


def test_vqvae_prior_is_causal():
    model = random_vqvae(size=16)
    codes = torch.randint(8, (1, 16))
    for j in range(16):
        other = codes.clone()
        other[:, j] = (other[:, j] + 1) % 8
        changed = (model.prior(codes) != model.prior(other)).any(2)[0]
        assert changed.tolist() == [i > j for i in range(16)]


@pytest.mark.parametrize("n_classes", [0, 10])
@torch.no_grad()
def test_vqvae_fast_sampling_is_slow_sampling(n_classes):
    model = random_vqvae(size=16, n_classes=n_classes)
    y = torch.tensor([3, 1, 4]) if n_classes > 0 else None
    torch.manual_seed(1)
    codes = torch.zeros(3, 16, dtype=torch.int64)
    for i in range(16):
        codes[:, i] = model.prior(codes, y)[:, i].softmax(1).multinomial(1)[:, 0]
    slow = model.decode(model.codebook[codes]).sigmoid()
    torch.manual_seed(1)
    torch.testing.assert_close(model.sample(3, y), slow)
