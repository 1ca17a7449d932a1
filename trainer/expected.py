"""Are these the latents and embeddings that the run expects? Both sides are named where not."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.shards import LatentSpec, ShardError, TextSpec
from trainer.config import Expect, SettingsError
from trainer.posterior import stored_channels

# What must be alike in all shards of an index. Not the model's name: folders move.
_LATENTS = [
    *("vae_class", "vae_sha256", "moments", "channels", "temporal", "spatial"),
    *("shift", "scale", "fingerprint"),
]
_TEXT = [
    *("encoder_class", "encoder_sha256", "max_length", "padding", "dtype", "width"),
    "fingerprint",
]


def check_expected(expect: Expect, spec: LatentSpec, text: TextSpec | None = None) -> None:
    """Raises SettingsError where latents or embeddings were made otherwise than `expect` says."""
    found = _sampling(spec) | {
        "vae": spec.vae_sha256 if expect.vae == spec.vae_sha256 else spec.vae,
        "encoder": "none: there are no text embeddings",
        "max_length": "none: there are no text embeddings",
    }
    if text is not None:
        known = expect.encoder == text.encoder_sha256
        found["encoder"] = text.encoder_sha256 if known else text.encoder
        found["max_length"] = text.max_length
    asked = {key: wanted for key, wanted in expect if wanted is not None}
    if expect.buckets is not None:
        asked["buckets"] = sorted(map(list, expect.buckets))
    texts = ("encoder", "max_length")
    wrong = [
        f"train.expect.{key} is {wanted}, but the {'embeddings' if key in texts else 'latents'} "
        f"were made with {found[key]}"
        for key, wanted in asked.items()
        if wanted != found[key]
    ]
    if wrong:
        raise SettingsError(
            "\n".join(
                [*wrong, "Change train.expect, or the sampling and `vidpipe run encode` again"]
            )
        )


def _sampling(spec: LatentSpec) -> dict[str, Any]:
    """What the latents were made with, as `Expect` has it; in words where that has no one value."""
    made = spec.sampling
    size = made.get("size")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    own = [made.get("frames"), height, width]
    buckets = [[b["frames"], b["height"], b["width"]] for b in made.get("buckets") or ()]
    shapes = sorted(buckets) or [own]
    found: dict[str, Any] = {"buckets": shapes, "policy": made.get("policy")}
    for key, values in zip(("frames", "height", "width"), zip(*shapes)):
        one = len(set(values)) == 1
        found[key] = values[0] if one else "buckets of " + ", ".join(map(str, values))
    every = made.get("policy") == "interval"
    found["interval"] = made.get("interval") if every else "a rate of frames a second"
    found["fps"] = f"every frame of {made.get('interval')}" if every else made.get("fps")
    return found


def check_shapes(shapes: pa.ChunkedArray, spec: LatentSpec) -> None:
    """Raises ShardError where the index names shapes that its VAE does not give."""
    lengths = pc.list_value_length(shapes)
    channels = pc.list_element(shapes.filter(pc.greater(lengths, 0)), 0)
    if (
        pc.all(pc.equal(lengths, 4)).as_py()
        and pc.all(pc.equal(channels, stored_channels(spec))).as_py()
    ):
        return
    wrong = next(s for s in shapes.to_pylist() if len(s) != 4 or s[0] != stored_channels(spec))
    raise ShardError(
        f"the index holds latents of shape {wrong}, but its VAE {spec.vae} gives "
        f"{stored_channels(spec)} x frames x height x width: run `vidpipe run`"
    )


def check_latents(shard: str, facts: dict[str, Any], spec: LatentSpec) -> None:
    """Raises ShardError where a shard's `facts` are not what the index says of its latents."""
    _same(shard, LatentSpec.from_json(_told(shard, facts)), spec, _LATENTS, "latents")


def check_text(shard: str, facts: dict[str, Any], spec: TextSpec) -> None:
    """Raises ShardError where a shard's `facts` are not what the index says of its embeddings."""
    _same(shard, TextSpec.from_json(_told(shard, facts)), spec, _TEXT, "embeddings")


def _told(shard: str, facts: dict[str, Any]) -> dict[str, Any]:
    if "spec" not in facts:
        raise ShardError(f"shard {shard} does not say what it holds: it is none of vidpipe's")
    return dict(facts["spec"])


def _same(shard: str, found: Any, index: Any, names: list[str], what: str) -> None:
    """Both are LatentSpecs or TextSpecs."""
    pairs = {name: (getattr(found, name), getattr(index, name)) for name in names}
    if isinstance(found, LatentSpec) and found.fingerprint != index.fingerprint:
        # Only then: settings without effect may differ in shards of one fingerprint.
        pairs |= {
            f"sampling.{key}": (found.sampling.get(key), index.sampling.get(key))
            for key in sorted({*found.sampling, *index.sampling})
        }
    differ = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differ:
        told = "; ".join(f"{name} is {one}, not {two}" for name, (one, two) in differ.items())
        raise ShardError(
            f"the {what} of shard {shard} were made otherwise than the index says: {told}. "
            "`vidpipe run` makes the index anew"
        )
