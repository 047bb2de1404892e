"""Inpaints validation images under several masks, and prints how well it does.

    python experiments/check_inpainting.py --workdir=/tmp/digits

`agreement` is the mean absolute difference, in grey levels, between the given pixels and what the latents decode to
before the given pixels are put back, without and with the projection; `bits per dim` is of the inpainted images, and of
the originals in the first line.
"""

import math

import numpy as np
import torch
from absl import app, flags

import jetformer
from jetformer import prng
from jetformer.sampling import decode, images

WORKDIR = flags.DEFINE_string("workdir", None, "Run of a JetFormer.", required=True)
COUNT = flags.DEFINE_integer("count", 64, "Number of images.")


def main(_) -> None:
    model = jetformer.load(WORKDIR.value, device="cpu")
    module, data = model.module, model.experiment.data
    (height, width, _), size = module.image_shape, decode.rows_per_token(module)
    batch = next(data.eval_batches(batch_size=COUNT.value))
    given, text = (torch.from_numpy(np.array(batch[key])) for key in ("image", "text"))
    text_mask = torch.from_numpy(batch["text_mask"]) if data.has_texts() else None
    keys = torch.stack([prng.key(i) for i in range(COUNT.value)])
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    masks = {
        "bottom half": (rows >= height // 2).expand(height, width),
        "right half": (columns >= width // 2).expand(height, width),
        "top half": (rows < height // 2).expand(height, width),
        "middle": ((rows - (height - 1) / 2).abs() < height / 4) & ((columns - (width - 1) / 2).abs() < width / 4),
        "half of the pixels": torch.from_numpy(np.random.default_rng(0).random((height, width)) < 0.5),
    }

    def bits_per_dim(pixels: torch.Tensor) -> float:
        latents = decode.encode_images(module, pixels, keys)
        # `decode_latents` scores latents, which are those of these pixels.
        nats = decode.decode_latents(module, text, latents, text_mask)[1]
        return -nats.mean().item() / (math.prod(module.image_shape) * math.log(2))

    print(f"{COUNT.value} originals: {bits_per_dim(given):.3f} bits per dim")
    for name, one in masks.items():
        mask = one.expand(COUNT.value, -1, -1)
        whole = images.fill(given, mask)
        kept = ~one.reshape(height // size, size, width // size, size).any(3).any(1).flatten().expand(COUNT.value, -1)
        found = []
        for _ in range(2):
            latents = decode.encode_images(module, whole, keys)
            latents = decode.sample_latents(module, text, keys, text_mask=text_mask, given=latents, kept=kept)
            with torch.no_grad():
                drawn = decode.to_uint8(module.decode_image(*latents)[0])
            whole = drawn.where(mask[..., None], given)
            agreement = (drawn.float() - given.float()).abs()[~mask].mean().item()
            found.append(f"agreement {agreement:.2f}, {bits_per_dim(whole):.3f} bits per dim")
        painted, _ = decode.inpaint_images(module, text, keys, images.fill(given, mask), mask, text_mask=text_mask)
        assert torch.equal(painted, whole)
        print(f"{name} sampled: {'; with projection '.join(found)}")


if __name__ == "__main__":
    app.run(main)
