"""Likelihoods are exact, in nats per image, and sampling draws from the very same distribution."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import AUTOREGRESSIVE, IMAGES, binary, nll_of, perturb, tiny, trained


@torch.no_grad()
def slow_sample(model, n, y=None, top=None, guidance=1.0):
    """The definition of sampling: a whole forward pass for each pixel."""
    x = torch.zeros(n, 1, model.size, model.size, dtype=next(model.parameters()).dtype)
    given = 0
    if top is not None:
        given = top[0].numel()
        x.view(n, -1)[:, :given] = top.flatten(1)
    for i in range(given, model.size**2):
        logits = uncond = model(x).flatten(1)[:, i]
        if y is not None:
            logits = uncond + guidance * (model(x, y).flatten(1)[:, i] - uncond)
        x.view(n, -1)[:, i] = torch.bernoulli(logits.sigmoid())
    return x


def jacobian(model):
    """Of all logits with respect to all pixels of a random image -> (H * W, H * W)."""
    x = binary(1, 1, model.size, model.size).double()
    slopes = torch.autograd.functional.jacobian(lambda x: model(x).flatten(), x)
    return slopes.view(model.size**2, model.size**2)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_probabilities_of_all_images_sum_to_one(name):
    model = trained(name, size=3)
    x = torch.arange(512)[:, None].bitwise_and(2 ** torch.arange(9)).ne(0).double()  # (512, 9)
    for y in (None, torch.full((512,), 7)):
        logits = model(x.view(512, 1, 3, 3), y).flatten(1).double()
        p = torch.where(x == 1, logits, -logits).sigmoid().prod(1)
        assert abs(p.sum() - 1) < 1e-6, p.sum()
        assert p.std() > 3e-4


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_causal_and_nothing_out_of_sight(name):
    """The Jacobian of all logits: 0 at the pixel itself and later, nowhere 0 before."""
    visible = torch.ones(81, 81).tril(-1).bool()
    if name == "pixelcnn":  # but for its blind spot, as its header draws it
        row, col = torch.arange(81) // 9, torch.arange(81) % 9
        up, right = row[:, None] - row, col - col[:, None]
        visible &= (up == 0) | (right <= 2 * up + 1)
        assert (~visible).tril(-1).sum() > 100
    assert ((jacobian(trained(name, size=9)) != 0) == visible).all()


@pytest.mark.parametrize("name", ["rnn", "made", "wavenet", "transformer"])
def test_last_pixel_sees_the_whole_image(name):
    model = perturb(tiny(name), 0.1).double()
    x = binary(1, 1, 28, 28).double().requires_grad_()
    model(x)[0, 0, -1, -1].backward()
    assert (x.grad.flatten()[:-1] != 0).all()
    assert x.grad.flatten()[-1] == 0


def test_pixelcnn_masks():
    """Of the 25 taps, A has the 12 before the centre, B the centre, too."""
    for kind, taps in ("A", 12), ("B", 13):
        conv = importlib.import_module("pixelcnn").MaskedConv2d(1, 1, 5, kind)
        slopes = torch.autograd.functional.jacobian(conv, torch.zeros(1, 1, 3, 5)).flatten()
        assert (slopes != 0).int().tolist() == [1] * taps + [0] * (15 - taps)


def test_made_tells_each_output_of_the_pixel_before_it():
    """Also without the direct weights: no degree may be missing."""
    model = tiny("made", hidden=80, n_layer=2, size=9).double()
    for p in model.parameters():  # all positive, so that every ReLU lets pass
        p.data.abs_().add_(0.01)
    model.direct.weight.data.zero_()
    assert (jacobian(model).diagonal(-1) != 0).all()


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_fast_sampling_is_slow_sampling(name):
    model = trained(name, size=7)
    y = torch.tensor([3, 1, 4])
    top = binary(3, 1, 4, 7).double()
    for args in (dict(top=top), dict(y=y), dict(y=y, guidance=2.5, top=top[:, :, :2])):
        torch.manual_seed(1)
        fast = model.sample(3, **args)
        torch.manual_seed(1)
        assert torch.equal(fast, slow_sample(model, 3, **args)), args
        assert ((fast == 0) | (fast == 1)).all()
        assert 0.02 < fast.mean() < 0.98
    assert torch.equal(model.sample(3, top=top)[:, :, :4], top)


@pytest.mark.parametrize("name", [*AUTOREGRESSIVE, "vqvae"])
def test_logits_from_the_cache_are_those_of_a_whole_pass(name):
    """For each pixel, or code of the VQ-VAE's prior, though the later ones are still unknown."""
    y = torch.tensor([3, 1, 10])
    if name == "vqvae":
        model = perturb(tiny(name, size=16)).double().eval()
        x = torch.randint(8, (3, 16))
        logits = model.prior(x, y)  # (3, 16, n_codes)
    else:
        model = perturb(trained(name, size=7), 0.1)
        x = binary(3, 1, 7, 7).double()
        logits = model(x, y).flatten(1)  # (3, 49)
    known = torch.zeros_like(x)
    cache = model.new_cache(3)
    with torch.no_grad():
        for i in range(logits.shape[1]):
            torch.testing.assert_close(model.logits_at(known, y, i, cache), logits[:, i])
            known.view(3, -1)[:, i] = x.view(3, -1)[:, i]
    assert logits.std() > 0.1


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_nll_is_in_nats_per_image(name):
    model = trained(name, size=8)
    x = binary(5, 1, 8, 8).double()  # binary images: nothing to draw
    loss, metrics = model.loss(x)
    p = model(x).sigmoid()
    nll = -torch.where(x == 1, p, 1 - p).log().sum() / 5
    assert abs(loss - nll) < 1e-4 * nll
    assert metrics["nll"] == loss
    assert abs(metrics["bpd"] - nll / 64 / math.log(2)) < 1e-4


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_completions_keep_what_is_given(name):
    pictures = tiny(name, size=14).pictures(IMAGES[2][:10, :, ::2, ::2] / 255)
    frames = pictures["sampling"]
    completion = pictures["completion"].view(6, 10, 1, 14, 14)
    assert frames.shape == (29, 20, 1, 14, 14)
    for i, frame in enumerate(frames):  # half a row more in each
        assert ((frame.flatten(1) != 0.5).sum(1) == 7 * i).all()
        assert ((frame == 0.5) | (frame == frames[-1])).all()
    assert (completion[:, :, :, :7] == completion[0, :, :, :7]).all()
    assert (completion[1, :, :, 7:] == 0.5).all()
    assert (completion[2] != completion[3]).any()
    if "field" in pictures:  # what pixel (7, 7) sees, enlarged
        visible = pictures["field"][0, 0, ::8, ::8] > 0
        assert visible[7, :7].all()
        assert not visible[7, 7:].any()
        assert not visible[8:].any()
        assert visible[6, 2:11].all()
        assert visible[6, 11] == (name == "gatedcnn")


def test_vae_loss_is_the_bound_in_nats():
    model = perturb(tiny("vae"), 0.05)
    x = binary(5, 1, 28, 28)
    torch.manual_seed(1)
    _, metrics = model.loss(x)
    torch.manual_seed(1)
    torch.bernoulli(x)  # the binarisation comes first
    logits, mu, logvar = model(x)
    p, sigma = logits.sigmoid(), logvar.exp().sqrt()
    recon = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 5
    q, prior = torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, prior).sum() / 5
    assert mu.shape == (5, 8)
    assert abs(logvar).max() > 0.01
    torch.testing.assert_close(metrics["recon"], recon, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(metrics["kl"], kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["neg_elbo"], recon + kl, rtol=1e-4, atol=1e-3)


def test_vae_bound_tightens_and_one_draw_is_the_elbo():
    model = perturb(tiny("vae"), 0.02).eval()
    x = binary(64, 1, 28, 28)
    single = torch.stack([model.bound(x, k=1)[0] for _ in range(30)])
    elbo = torch.stack([model.loss(x)[0].detach() for _ in range(30)])
    iwae, metrics = model.bound(x, k=64)
    noise = (single.var() + elbo.var()).div(30).sqrt()
    assert noise < 0.5
    assert abs(single.mean() - elbo.mean()) < 4 * noise
    assert iwae < elbo.mean() - 4 * noise
    assert metrics["iwae"] == iwae


def test_vae_bound_is_exact_for_a_known_integral():
    """A decoder that ignores z: p(x) is a product of coins, whatever the encoder does."""
    model = perturb(tiny("vae", z_dim=1), 0.02).double()
    model.decode = lambda z, y=None: torch.full((len(z), 1, 28, 28), 0.3, dtype=torch.float64)
    x = binary(8, 1, 28, 28).double()
    nll = nll_of(torch.full_like(x, 0.3), x)
    assert abs(model.bound(x, k=2_000)[0] - nll) < 0.02


def vqvae_log_prior(model, codes, y=None):
    return model.prior(codes, y).log_softmax(2).gather(2, codes[..., None]).sum((1, 2))


def test_vqvae_prior_sums_to_one_and_bounds_the_likelihood():
    model = perturb(tiny("vqvae", n_codes=3, size=8)).double().eval()
    model.codebook.data.normal_()
    codes = torch.arange(81)[:, None] // 3 ** torch.arange(4) % 3  # all maps of 2 x 2 codes
    for y in (None, torch.full((81,), 7)):
        log_prior = vqvae_log_prior(model, codes, y)
        assert abs(log_prior.exp().sum() - 1) < 1e-6
        assert log_prior.std() > 0.1
    x = binary(1, 1, 8, 8).double()
    logits = model.decode(model.codebook[codes])
    log_px = torch.where(x == 1, logits, -logits).sigmoid().log().sum((1, 2, 3))
    log_prior = vqvae_log_prior(model, codes)
    exact, terms = -(log_prior + log_px).logsumexp(0), model.loss(x)[1]
    mine = (codes == model(x)[1]).all(1)  # among all maps, that of the encoder
    assert abs(terms["prior"] + log_prior[mine][0]) < 1e-4
    assert abs(terms["recon"] + log_px[mine][0]) < 1e-4
    assert terms["neg_elbo"] == terms["recon"] + terms["prior"] > exact


def test_vqvae_prior_is_causal_and_samples_fast():
    model = perturb(tiny("vqvae", size=16)).double().eval()
    model.codebook.data.normal_()
    codes = torch.randint(8, (1, 16))
    for j in range(16):
        other = codes.clone()
        other[:, j] += 1 - 2 * (other[:, j] > 3)
        changed = (model.prior(codes) != model.prior(other)).any(2)[0]
        assert changed.tolist() == [i > j for i in range(16)]
    y = torch.tensor([3, 1, 4])
    top = torch.randint(8, (3, 6))
    for args in (dict(), dict(y=y), dict(y=y, guidance=2.5), dict(y=y, top=top)):
        torch.manual_seed(1)
        fast = model.sample(3, **args)
        torch.manual_seed(1)
        given = args.get("top", top[:, :0])
        codes = F.pad(given, (0, 16 - given.shape[1]))
        for i in range(given.shape[1], 16):
            logits = model.prior(codes, args.get("y"))[:, i]
            uncond = model.prior(codes)[:, i]
            logits = uncond + args.get("guidance", 1.0) * (logits - uncond)
            codes[:, i] = logits.softmax(1).multinomial(1)[:, 0]
        torch.testing.assert_close(fast, model.decode(model.codebook[codes]).sigmoid())
