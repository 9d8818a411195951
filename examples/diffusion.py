"""Adapt a diffusion transformer to another style, and hand it to a pipeline: Flux, on digits.

    python examples/diffusion.py            # minutes on a CPU
    python examples/diffusion.py --quick    # under a minute

There is no pretrained model of this size to fetch, so a small Flux first learns to draw
scikit-learn's digits, white on black. An adapter learns black on white; diffusers' own pipeline
saves it, loads it and draws with it. Without it the base draws as before.
"""

import argparse

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from sklearn.datasets import load_digits

import hf_lora

OUTPUT = "outputs/diffusion"
SIDE, PATCHES, WIDTH = 8, 16, 4
"""Pixels of a side; a picture is 16 patches of 4 pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args()
    steps = 150 if args.quick else 1500
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=WIDTH,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    train(model, steps, inverted=False)
    model.save_pretrained(f"{OUTPUT}/base")

    model = FluxTransformer2DModel.from_pretrained(f"{OUTPUT}/base")
    print(f"the base draws pictures with {brightness(model):.0%} of the light")
    print(hf_lora.plan(model, targets=["attention", "mlp"], r=8))
    model = hf_lora.wrap(model, targets=["attention", "mlp"], r=8)
    train(model, steps, inverted=True)
    adapted = draw(model)
    print(f"\nadapted it draws pictures with {light(adapted):.0%} of the light")

    FluxPipeline.save_lora_weights(f"{OUTPUT}/lora", transformer_lora_layers=model)
    with hf_lora.no_adapter(model):
        print(f"without the adapter: {brightness(model):.0%}")
    hf_lora.unwrap(model)
    fresh = hf_lora.wrap(model, targets=["attention", "mlp"], r=8, adapter="fresh")
    pipe = pipeline(fresh)
    pipe.load_lora_weights(f"{OUTPUT}/lora", adapter_name="inverted")
    again = draw(fresh)
    assert torch.allclose(adapted, again, rtol=1e-3, atol=1e-3)
    print(f"loaded by the pipeline ({pipe.get_active_adapters()[0]}), it draws the same")


def digits(inverted: bool) -> torch.Tensor:
    """Return all digits as rows of patches, (N, 16, 4)."""
    pictures = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)
    pictures = -pictures if inverted else pictures
    half = SIDE // 2
    return pictures.view(-1, half, 2, half, 2).transpose(2, 3).reshape(-1, PATCHES, WIDTH)


def places() -> dict[str, torch.Tensor]:
    """Return where the patches are, and what stands for a text that says nothing."""
    at = torch.arange(PATCHES)
    ids = torch.stack([torch.zeros(PATCHES), at // 4, at % 4], 1)
    return {"img_ids": ids, "txt_ids": torch.zeros(1, 3)}


def velocity(model: torch.nn.Module, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Return where a noisy picture goes."""
    silence = {
        "encoder_hidden_states": torch.zeros(len(x), 1, 16),
        "pooled_projections": torch.zeros(len(x), 16),
    }
    return model(hidden_states=x, timestep=time, **silence, **places()).sample


def train(model: torch.nn.Module, steps: int, inverted: bool) -> None:
    """Learn to tell noise from pictures of one style: flow matching."""
    pictures, drawn = digits(inverted), torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for step in range(steps):
        x = pictures[torch.randint(len(pictures), (64,), generator=drawn)]
        noise, time = torch.randn(x.shape, generator=drawn), torch.rand(64, generator=drawn)
        mixed = torch.lerp(x, noise, time.view(-1, 1, 1))
        loss = (velocity(model.train(), mixed, time) - (noise - x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


@torch.inference_mode()
def draw(model: torch.nn.Module, count: int = 32, steps: int = 12) -> torch.Tensor:
    """Return pictures, from noise that is equal each time."""
    x = torch.randn(count, PATCHES, WIDTH, generator=torch.Generator().manual_seed(3))
    for step in range(steps):
        time = torch.full((count,), 1 - step / steps)
        x = x - velocity(model.eval(), x, time) / steps
    return x


def light(pictures: torch.Tensor) -> float:
    """Return how bright pictures are: 0 is black, 1 white."""
    return float((pictures.clamp(-1, 1).mean() + 1) / 2)


def brightness(model: torch.nn.Module) -> float:
    return light(draw(model))


def pipeline(model: torch.nn.Module) -> FluxPipeline:
    """Return diffusers' pipeline around the transformer alone."""
    others = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler=scheduler, transformer=model, **dict.fromkeys(others))


if __name__ == "__main__":
    main()
