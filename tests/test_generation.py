"""Flow matching is exact where it has a closed form, the sampler is the Euler loop it claims to be, and the generation
head honours its condition, its mask, its guidance and its seed; four pictures are learned by heart; the autoencoder
never moves.
"""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from pipeline import pipeline_of, pipeline_pictures
from toy import toy_model, toy_processor

import unimodal.heads
from unimodal.diffusion import T_MIN, euler_sample, flow_path, guide, sample_t, velocity_from_sample
from unimodal.heads.generation import GenerationHead
from unimodal.heads.patches import PatchAutoencoder
from unimodal.inference import Unimodal

SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 4}
UNET_SIZES = {"block_out_channels": [16, 32], "num_attention_heads": 2, "norm_num_groups": 4}
KINDS = [(name, prediction) for name in ("sana", "pixart", "unet") for prediction in ("velocity", "sample")]


def small_head(transformer="sana", prediction="velocity", **kwargs) -> GenerationHead:
    torch.manual_seed(0)
    kwargs = {"size": 16, "transformer_kwargs": UNET_SIZES if transformer == "unet" else SIZES} | kwargs
    return GenerationHead(condition_width=24, transformer=transformer, prediction=prediction, **kwargs)


def awake(head: GenerationHead) -> GenerationHead:
    """Undo the zero start of the last layer, so that outputs depend on inputs; no dropping of conditions."""
    torch.nn.init.normal_(head.transformer.proj_out.weight, std=0.2)
    return head.eval()


def test_path_and_target_by_hand():
    x, noise, t = (
        torch.tensor([[1.0, -1.0], [2.0, 0.0]]),
        torch.tensor([[0.0, 1.0], [-2.0, 4.0]]),
        torch.tensor([0.25, 0.5]),
    )
    x_t, target = flow_path(x, noise, t)
    assert torch.equal(x_t, torch.tensor([[0.75, -0.5], [0.0, 2.0]]))
    assert torch.equal(target, torch.tensor([[-1.0, 2.0], [-4.0, 4.0]]))


def test_target_is_the_derivative_of_the_path():
    x, noise, t = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double(), torch.rand(3).double()
    after, before = flow_path(x, noise, t + 1e-6)[0], flow_path(x, noise, t - 1e-6)[0]
    torch.testing.assert_close((after - before) / 2e-6, flow_path(x, noise, t)[1])


def test_path_names_wrong_shapes():
    with pytest.raises(
        ValueError, match=r"pictures \(2, 3\) need noise of the same shape.*noise \(2, 4\) and times \(2,\)"
    ):
        flow_path(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2))


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
def test_times_stay_inside_and_repeat_by_generator(distribution):
    draw = [sample_t(4096, distribution=distribution, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draw)
    assert draw[0].min() >= T_MIN and draw[0].max() <= 1
    assert abs(draw[0].mean() - 0.5) < 0.02
    assert sample_t(4096, mean=1.0, generator=torch.Generator().manual_seed(3)).mean() > 0.65


def test_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="'logit_normal' or 'uniform', got 'cosine'"):
        sample_t(4, distribution="cosine")


def test_the_true_sample_gives_the_true_velocity_at_every_training_time():
    x, noise, t = torch.randn(64, 3, 4, 4), torch.randn(64, 3, 4, 4), sample_t(64, distribution="uniform")
    x_t, target = flow_path(x, noise, t)
    torch.testing.assert_close(velocity_from_sample(x_t, x, t), target, atol=1e-4, rtol=1e-4)


def test_velocity_stays_finite_at_time_zero():
    assert velocity_from_sample(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1)).item() == pytest.approx(1 / T_MIN)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampler_is_a_hand_written_euler_loop(shift):
    noise, steps = torch.randn(2, 3, 4, 4), 7

    def field(x, t):
        return torch.sin(3 * x) + t.view(-1, 1, 1, 1) * x.square()

    times = torch.linspace(1, 0, steps + 1)
    times = shift * times / (1 + (shift - 1) * times)
    x = noise
    for now, then in zip(times[:-1], times[1:]):
        x = x + (then - now) * field(x, now.expand(2))
    torch.testing.assert_close(
        euler_sample(field, noise, num_inference_steps=steps, shift=shift), x, atol=1e-5, rtol=1e-5
    )


def test_sampler_reaches_the_picture_along_the_straight_path():
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for steps in (1, 5):
        torch.testing.assert_close(
            euler_sample(lambda x_t, t: noise - x, noise, num_inference_steps=steps), x, atol=1e-5, rtol=1e-5
        )


def test_sampler_refuses_no_steps():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        euler_sample(lambda x, t: x, torch.zeros(1), num_inference_steps=0)


def test_guidance_by_hand():
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 1.0) == 3
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 2.0) == 5


@pytest.mark.parametrize("transformer,prediction", KINDS)
def test_first_prediction_is_zero(transformer, prediction):
    head = small_head(transformer, prediction).eval()
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1.0])
    zero = torch.zeros_like(x_t)
    expected = velocity_from_sample(x_t, zero, t) if prediction == "sample" else zero
    torch.testing.assert_close(head(x_t, t, torch.randn(2, 5, 24)), expected)


@pytest.mark.parametrize("transformer,prediction", KINDS)
def test_masked_condition_tokens_change_nothing_and_real_ones_do(transformer, prediction):
    head = awake(small_head(transformer, prediction))
    x_t, t, condition = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.9]), torch.randn(2, 6, 24)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    changed = condition.clone()
    changed[:, 4:] = 9.0
    velocity = head(x_t, t, condition, mask)
    torch.testing.assert_close(head(x_t, t, changed, mask), velocity)
    torch.testing.assert_close(head(x_t, t, condition[:, :4]), velocity, atol=1e-5, rtol=1e-5)
    assert (head(x_t, t, changed) - velocity).abs().max() > 1e-3


@pytest.mark.parametrize("transformer", ["sana", "pixart"])
def test_patches_know_where_they_are(transformer):
    head = awake(small_head(transformer))
    velocity = head(torch.zeros(1, 3, 16, 16), torch.tensor([0.5]), torch.randn(1, 5, 24))  # alike but for their place
    patches = velocity.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(16, -1)
    apart = torch.cdist(patches, patches) + torch.eye(16)
    assert apart.min() > 1e-3


@pytest.mark.parametrize("transformer", ["sana", "pixart", "unet"])
def test_guidance_of_one_is_the_plain_conditional_pass(transformer):
    head, condition = awake(small_head(transformer)), torch.randn(2, 5, 24)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    plain = euler_sample(lambda x, t: head(x, t, condition), noise, num_inference_steps=4)
    sampled = head.sample(
        condition, num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(sampled, (plain / 2 + 0.5).clamp(0, 1))
    with torch.no_grad():
        head.null_condition.fill_(7.0)  # has no say at guidance 1, and one at any other
    torch.testing.assert_close(
        head.sample(condition, num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(5)),
        sampled,
    )
    guided = head.sample(
        condition, num_inference_steps=4, guidance_scale=2.0, generator=torch.Generator().manual_seed(5)
    )
    assert not torch.allclose(guided, sampled)


def test_guidance_without_a_null_condition_is_refused():
    head = small_head(null_probability=0.0)
    head.sample(torch.randn(1, 5, 24), num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs a null condition.*null_probability=0"):
        head.sample(torch.randn(1, 5, 24), guidance_scale=2.0)


def test_conditions_are_dropped_in_training_only():
    head, t = awake(small_head(null_probability=0.25)), torch.full((512,), 0.5)
    x_t, condition = torch.zeros(512, 3, 16, 16), torch.randn(1, 5, 24).expand(512, -1, -1)
    null = head(x_t[:1], t[:1], head.null_condition.expand(1, 5, -1))
    assert not torch.isclose(head(x_t, t, condition), null, atol=1e-5).flatten(1).all(1).any()
    dropped = torch.isclose(head.train()(x_t, t, condition), null, atol=1e-5).flatten(1).all(1)
    assert 0.18 < dropped.float().mean() < 0.32


@pytest.mark.parametrize("transformer,prediction", KINDS)
def test_pictures_repeat_by_generator(transformer, prediction):
    head, condition = awake(small_head(transformer, prediction)), torch.randn(2, 5, 24)
    one, same, other = (
        head.sample(condition, num_inference_steps=3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (2, 3, 16, 16) and one.min() >= 0 and one.max() <= 1


@pytest.mark.parametrize("transformer,prediction", KINDS)
def test_gradient_reaches_every_trained_parameter_and_the_condition(transformer, prediction):
    head = awake(small_head(transformer, prediction, autoencoder="tiny", autoencoder_kwargs=TINY)).train()
    condition = torch.randn(32, 5, 24, requires_grad=True)
    head(torch.randn(32, 4, 8, 8), sample_t(32), condition).square().mean().backward()
    trained = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None or not grad.abs().sum() > 0] == []
    assert not any(name.startswith("autoencoder") for name in trained) and "null_condition" in trained
    assert condition.grad.abs().sum() > 0


@pytest.mark.parametrize("transformer,prediction", KINDS)
def test_four_pictures_are_learned_by_heart(transformer, prediction):
    head = small_head(transformer, prediction, size=8)
    quarters = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pictures = torch.nn.functional.interpolate(quarters, scale_factor=4)
    conditions = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    index = torch.arange(32) % 4
    for _ in range(300 if transformer == "pixart" else 200):
        x = head.encode(pictures[index])
        x_t, target = flow_path(x, torch.randn_like(x), t := sample_t(32))
        loss = (head(x_t, t, conditions[index]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampled = head.eval().sample(conditions, num_inference_steps=10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.cdist(sampled.flatten(1), pictures.flatten(1)).argmin(1).tolist() == [0, 1, 2, 3]


TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}
KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "shift_factor": 0.1,
}


@pytest.mark.parametrize("name,kwargs", [("tiny", TINY), ("kl", KL)])
def test_autoencoder_is_used_as_diffusers_means_it_and_stays_frozen(name, kwargs):
    head = small_head(autoencoder=name, autoencoder_kwargs=kwargs).train()
    assert not head.autoencoder.training and not any(p.requires_grad for p in head.autoencoder.parameters())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = head.encode(images)
    assert latents.shape == (2, *head.latent_shape) == (2, 4, 8, 8)
    own = head.autoencoder.encode(images)
    own = own.latents if name == "tiny" else own.latent_dist.mode()
    torch.testing.assert_close(
        latents, (own - (head.autoencoder.config.shift_factor or 0)) * head.autoencoder.config.scaling_factor
    )
    torch.testing.assert_close(head.decode(latents), head.autoencoder.decode(own).sample)

    before = {key: value.clone() for key, value in head.autoencoder.state_dict().items()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    head(latents, torch.tensor([0.2, 0.7]), torch.randn(2, 5, 24)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in head.autoencoder.state_dict().items())


def drawn(count: int) -> torch.Tensor:
    """Pictures [count, 3, 16, 16] in [-1, 1] that vary in every component."""
    blocks = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), scale_factor=4, mode="bilinear")
    return (2 * blocks - 1 + 0.05 * torch.randn(count, 3, 16, 16)).clamp(-1, 1)


def test_patches_are_whitened_principal_components():
    images = drawn(300)
    autoencoder = PatchAutoencoder(latent_channels=12, patch_size=4)
    autoencoder.fit(images)
    latents = autoencoder.encode(images)
    assert latents.shape == (300, *autoencoder.latent_shape(16)) == (300, 12, 4, 4)
    rows = latents.transpose(0, 1).flatten(1)  # [C, M H W]
    torch.testing.assert_close(rows.mean(1), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows @ rows.T / rows.shape[1], torch.eye(12), atol=1e-3, rtol=0)

    # what is lost is what an SVD of all patches puts beyond its twelfth direction
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48).double()
    lost = torch.linalg.svdvals(patches - patches.mean(0))[12:].square().sum() / patches.numel()
    assert (autoencoder.decode(latents) - images).square().mean().item() == pytest.approx(lost.item(), rel=1e-3)


def test_all_components_give_the_picture_back():
    images = drawn(300)
    head = small_head(autoencoder="patches", autoencoder_kwargs={"latent_channels": 48, "patch_size": 4})
    head.autoencoder.fit(images)
    assert head.latent_shape == (48, 4, 4) and not any(
        name.startswith("autoencoder") for name, _ in head.named_parameters()
    )
    torch.testing.assert_close(head.decode(head.encode(images)), images, atol=1e-4, rtol=0)
    other = small_head(autoencoder="patches", autoencoder_kwargs={"latent_channels": 48, "patch_size": 4})
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.encode(images), head.encode(images))


def test_patches_say_what_they_lack():
    autoencoder = PatchAutoencoder(latent_channels=12)
    with pytest.raises(ValueError, match=r"call fit\(images\) or load a checkpoint"):
        autoencoder.encode(drawn(1))
    with pytest.raises(ValueError, match="these 8 pictures vary in 3 components only, and 12 are to be kept"):
        autoencoder.fit(torch.rand(8, 3, 1, 1).expand(-1, -1, 16, 16))
    with pytest.raises(ValueError, match="1 to 48 components, got latent_channels=49"):
        PatchAutoencoder(latent_channels=49, patch_size=4)
    with pytest.raises(ValueError, match="patch_size 5 does not divide pictures of 16 pixels"):
        small_head(autoencoder="patches", autoencoder_kwargs={"patch_size": 5})


@pytest.mark.parametrize("transformer", ["sana", "pixart", "unet"])
def test_bfloat16_autocast_is_close_and_returns_the_input_type(transformer):
    head = awake(small_head(transformer))
    x_t, t, condition = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.9]), torch.randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(x_t, t, condition)
    full = head(x_t, t, condition)
    assert low.dtype == torch.float32
    assert (low - full).abs().max() < 0.05 * full.abs().max()


def test_the_unet_is_that_of_diffusers_on_folded_pixels():
    """diffusers' own class, built and called as its documentation says, with the weights of the head."""
    head = awake(small_head("unet"))
    plain = UNet2DConditionModel(
        sample_size=8, in_channels=12, out_channels=12, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip
    plain.load_state_dict(head.transformer.network.state_dict())
    x, t, condition = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.9]), torch.randn(2, 5, 24)
    squares = x.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, 3, 8, 8, 2, 2]
    folded = squares.permute(0, 1, 4, 5, 2, 3).reshape(2, 12, 8, 8)
    normal = (condition - condition.mean(-1, keepdim=True)) / (
        condition.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    output = plain(folded, 1000 * t, normal).sample
    expected = output.reshape(2, 3, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    torch.testing.assert_close(head(x, t, condition), expected, atol=1e-5, rtol=1e-5)
    attention = [one for one in plain.modules() if type(one).__name__ == "Attention"]
    assert {one.heads for one in attention} == {2}  # the number of heads, not their width


def test_attention_stands_on_the_levels_that_ask_for_it():
    everywhere = small_head("unet", transformer_kwargs=UNET_SIZES | {"cross_attention": [True, True]})
    blocks = [type(one).__name__ for one in everywhere.transformer.network.down_blocks]
    assert blocks == ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    coarsest = [type(one).__name__ for one in small_head("unet").transformer.network.down_blocks]
    assert coarsest == ["DownBlock2D", "CrossAttnDownBlock2D"]


@pytest.mark.parametrize("transformer,prediction", KINDS)
def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch(transformer, prediction):
    head, condition = awake(small_head(transformer, prediction)), torch.randn(3, 5, 24)
    x_t, t = torch.randn(3, 3, 16, 16), torch.tensor([0.2, 0.5, 0.9])
    together = head(x_t, t, condition)
    alone = torch.cat([head(x_t[i : i + 1], t[i : i + 1], condition[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_wrong_shapes_are_named():
    head = small_head()
    with pytest.raises(ValueError, match=r"expected condition tokens \[B, N, 24\], got \(2, 5, 32\)"):
        head(torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, 5, 32))
    with pytest.raises(ValueError, match=r"expected condition tokens \[B, N, 24\], got \(2, 24\)"):
        head.sample(torch.zeros(2, 24))
    with pytest.raises(ValueError, match=r"expected x_t \[B, 3, 16, 16\], got \(2, 4, 16, 16\)"):
        head(torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 5, 24))
    with pytest.raises(
        ValueError, match=r"expected images \[B, 3, 16, 16\] in \[-1, 1\], got \(2, 3, 32, 32\); resize"
    ):
        head.encode(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="patch_size 3 does not divide the side 16"):
        small_head(transformer_kwargs={"patch_size": 3})


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"transformer": "pixarts"}, "unknown transformer 'pixarts'; did you mean 'pixart'"),
        ({"transformer": "os.system"}, "unknown transformer 'os.system'"),
        ({"autoencoder": "tini"}, "unknown autoencoder 'tini'; did you mean 'tiny'"),
        (
            {"transformer_kwargs": {"num_layer": 2}},
            "unknown setting 'num_layer' of transformer 'sana'; did you mean 'num_layers'",
        ),
        ({"transformer_kwargs": {"in_channels": 9}}, "unknown setting 'in_channels'"),
        (
            {"transformer": "unet", "transformer_kwargs": {"attention_head_dim": 32}},
            "unknown setting 'attention_head_dim' of transformer 'unet'; did you mean 'num_attention_heads'",
        ),
        (
            {"transformer": "unet", "size": 18},
            "a side of 18 cannot be halved 1 times after patches of 2; give a multiple of 4",
        ),
        (
            {"transformer": "unet", "transformer_kwargs": {"block_out_channels": [16, 30], "norm_num_groups": 4}},
            r"norm_num_groups 4 and num_attention_heads 4 must divide each of block_out_channels \[16, 30\]",
        ),
        (
            {"transformer": "unet", "transformer_kwargs": {"cross_attention": [True]}},
            r"cross_attention needs one value for each of 2 levels, got \[True\]",
        ),
        (
            {"autoencoder": "tiny", "autoencoder_kwargs": {"latents": 4}},
            "unknown setting 'latents' of autoencoder 'tiny'",
        ),
    ],
)
def test_names_come_from_our_tables_only(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_head(**kwargs)


@pytest.mark.parametrize("steps,scale", [(1, 3.0), (5, 2.0), (7, 1.5)])
def test_the_sampler_draws_what_diffusers_own_pipeline_draws(steps, scale):
    head = awake(small_head("unet"))
    condition = torch.randn(3, 5, 24)
    noise = torch.stack([torch.randn(head.latent_shape, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    sources = [torch.Generator().manual_seed(i) for i in range(3)]
    drawn = head.sample(condition, num_inference_steps=steps, guidance_scale=scale, generator=sources)
    expected = pipeline_pictures(pipeline_of(head), head, condition, noise, steps, scale)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    assert drawn.std() > 0.05 and 0 < (drawn > 0).float().mean() < 1  # or there is nothing to compare


def test_a_model_with_a_unet_draws_the_same_after_saving(tmp_path):
    settings = {"transformer": "unet", "transformer_kwargs": UNET_SIZES, "size": 16}
    model = Unimodal(toy_model(generation=settings), toy_processor())
    awake(model.model.head("generation"))
    model.save_pretrained(tmp_path)
    again = Unimodal.from_pretrained(tmp_path)
    draw = {"num_inference_steps": 2, "guidance_scale": 2.0}
    pictures = [
        np.asarray(one.generate_image("a red circle", generator=torch.Generator().manual_seed(0), **draw).images[0])
        for one in (model, again)
    ]
    assert np.array_equal(*pictures) and pictures[0].std() > 0


def test_head_is_reachable_by_its_short_path():
    assert unimodal.heads.GenerationHead is GenerationHead
