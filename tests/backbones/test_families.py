"""What holds for the tiny guide on every family of denoisers."""

from __future__ import annotations

import pickle
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide
from pilotfish.interface import GuideError, GuideOutput, Refresh, TextConditions
from pilotfish.teacher import Student, checkpoint_in_pass
from tests import components
from tests.backbones.stubs import TIME, FixedGuide, count_hooks, guided, plain

NO_PART: dict[str, Any] = {
    "text": False, "attention": False, "modulation": False, "rank": 0, "head": 0,
}  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "text": {"text": True},
    "attention": {"attention": True},
    "modulation": {"modulation": True},
    "layers": {"rank": 4},
    "head": {"head": 4},
    "templates": {"head": 4, "condition_on_negative": True, "uncond_templates": 3},
}
ALL_PARTS = {"rank": 4, "head": 4, "condition_on_negative": True, "uncond_templates": 3}


@pytest.fixture
def denoiser(family: components.Family) -> Any:
    return family.denoiser().requires_grad_(False)


@pytest.fixture
def fresh(family: components.Family, denoiser: Any) -> TinyGuide:
    return tiny(family, denoiser, **ALL_PARTS)


@pytest.fixture
def trained(fresh: TinyGuide) -> TinyGuide:
    return components.randomise(fresh)


@pytest.fixture
def latents(family: components.Family) -> torch.Tensor:
    return family.latents(2)


@pytest.fixture
def text(family: components.Family) -> TextConditions:
    return family.text(2)


@pytest.fixture
def negative(family: components.Family) -> TextConditions:
    """One, shorter than the prompts."""
    return family.text(1, length=5, seed=7)


def tiny(family: components.Family, denoiser: Any, **settings: Any) -> TinyGuide:
    torch.manual_seed(3)
    return TinyGuide.for_denoiser(denoiser, family.prediction_type, **settings).eval()


def test_a_fresh_guide_changes_nothing(
    denoiser: Any, fresh: TinyGuide, latents: torch.Tensor, text: Any, negative: Any
) -> None:
    made = guided(denoiser, fresh, latents, text, negative)
    assert torch.equal(made, plain(denoiser, latents, text))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0, -3.0, torch.tensor([1.0, 0.3])])
def test_a_scale_of_at_most_1_changes_nothing(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any, negative: Any, scale: Any
) -> None:
    made = guided(denoiser, trained, latents, text, negative, scale=scale)
    assert torch.equal(made, plain(denoiser, latents, text))


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_changes_the_prediction_once_trained(
    family: components.Family, denoiser: Any, part: str, latents: torch.Tensor, text: Any,
    negative: Any,
) -> None:  # fmt: skip
    if part == "modulation" and not Backbone.of(denoiser).sites()["modulation"]:
        with pytest.raises(GuideError, match="at least one"):
            tiny(family, denoiser, **NO_PART | PARTS[part])
        return
    guide = tiny(family, denoiser, **NO_PART | PARTS[part])
    expected = plain(denoiser, latents, text)
    assert torch.equal(guided(denoiser, guide, latents, text, negative), expected)
    if part == "templates":
        with torch.no_grad():
            guide.templates.templates.weight.normal_()
    else:
        components.randomise(guide)
    made = guided(denoiser, guide, latents, text, negative)
    assert not torch.allclose(made, expected, atol=1e-4)
    assert made.isfinite().all()


def test_the_negative_prompt_counts(
    family: components.Family, denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any,
    negative: Any,
) -> None:  # fmt: skip
    made = guided(denoiser, trained, latents, text, negative)
    other = guided(denoiser, trained, latents, text, family.text(1, length=5, seed=8))
    assert not torch.allclose(made, other, atol=1e-4)


def test_samples_do_not_mix(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any, family: components.Family
) -> None:
    negatives, scale = family.text(2, length=5, seed=7), torch.tensor([2.5, 7.0])
    together = guided(denoiser, trained, latents, text, negatives, scale=scale)
    for i in range(2):
        one = slice(i, i + 1)
        alone = guided(
            denoiser, trained, latents[one], text[one], negatives[one], time=TIME[one],
            scale=scale[one],
        )  # fmt: skip
        torch.testing.assert_close(together[one], alone, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (8, 4), (4, 8)])
def test_latents_and_prediction_have_one_order_of_channels_and_tokens(
    denoiser: Any, latents: torch.Tensor, text: Any, negative: Any, size: tuple[int, int]
) -> None:
    """What the head adds of its own latents arrives in the prediction pixel by pixel."""
    z, guide = latents[..., : size[0], : size[1]], FixedGuide()
    backbone = Backbone.of(denoiser)
    head = backbone.sites()["head"]["module"]

    def add(entered: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        return made + guide.inputs[-1].latents

    guide.output = GuideOutput(residuals={head: add})
    made = guided(denoiser, guide, z, text, negative)
    torch.testing.assert_close(made, plain(denoiser, z, text) + backbone.sign * z)


def test_a_guide_trained_at_one_size_serves_others(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any, negative: Any
) -> None:
    z = latents[..., :4]
    made = guided(denoiser, trained, z, text, negative)
    assert made.shape == z.shape
    assert not torch.allclose(made, plain(denoiser, z, text), atol=1e-4)


def test_removed_hooks_leave_no_trace(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any
) -> None:
    expected, keys = plain(denoiser, latents, text), list(denoiser.state_dict())
    hooks = Backbone.of(denoiser).install(trained)
    assert count_hooks(denoiser) > 0
    assert list(denoiser.state_dict()) == keys
    assert torch.equal(plain(denoiser, latents, text), expected)  # outside of a guided pass
    hooks.remove()
    assert count_hooks(denoiser) == 0
    assert torch.equal(plain(denoiser, latents, text), expected)


def test_removed_hooks_leave_the_attention_processors_as_they_were(
    family: components.Family, denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any,
    negative: Any,
) -> None:  # fmt: skip
    """Also after a call that runs both passes, with texts of two lengths where that works."""

    def processors(denoiser: Any) -> dict[str, Any]:
        layers = denoiser.named_modules()
        return {name: m.processor for name, m in layers if hasattr(m, "processor")}

    backbone, before = Backbone.of(denoiser), processors(denoiser)
    assert before
    hooks = backbone.install(trained)
    second = negative if family.masked and family is not components.FAMILIES["chroma"] else text
    schedule = torch.tensor([900.0, 500.0])
    guided_pass = GuidedPass(
        trained, lambda: 4.0, lambda: second, hooks=hooks, timesteps=lambda: schedule,
        refresh_at=lambda steps: (0,),
    )  # fmt: skip
    with torch.no_grad(), guided_pass.open():
        backbone(latents, TIME, text)
        assert guided_pass.refresh is not None
    copied = processors(deepcopy(denoiser)).values()
    assert [type(p) for p in copied] == [type(p) for p in before.values()]
    hooks.remove()
    assert count_hooks(denoiser) == 0
    after = processors(denoiser)
    assert after.keys() == before.keys()
    assert all(after[name] is processor for name, processor in before.items())


def test_a_copied_or_pickled_denoiser_takes_no_guide_along(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any, negative: Any
) -> None:
    expected = plain(denoiser, latents, text)
    Backbone.of(denoiser).install(trained)
    for copy in (deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):  # noqa: S301
        with torch.no_grad(), GuidedPass(trained, lambda: 4.0, lambda: negative).open():
            made = Backbone.of(copy)(latents, TIME, text)
            assert not torch.allclose(Backbone.of(denoiser)(latents, TIME, text), made)
        assert torch.equal(made, expected)


# -- training ----------------------------------------------------------------------------------


def gradients(
    student: Student, *given: Any, refresh: Refresh | None = None
) -> dict[str, torch.Tensor | None]:
    student.zero_grad()
    made = student(*given, torch.tensor([3.0, 7.5]), refresh)
    backward = threading.Thread(target=made.square().mean().backward)  # as CUDA does it
    backward.start()
    backward.join()
    return {n: None if p.grad is None else p.grad for n, p in student.named_parameters()}


def test_a_training_step_reaches_every_parameter(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any, negative: Any
) -> None:
    batch = latents, TIME, text, negative
    found = gradients(Student(trained, denoiser), *batch, refresh=components.refresh(latents))
    assert not [n for n, g in found.items() if g is None or not g.any()]
    assert all(p.grad is None for p in denoiser.parameters())


def test_a_fresh_guide_can_be_trained(
    denoiser: Any, fresh: TinyGuide, latents: torch.Tensor, text: Any, negative: Any
) -> None:
    """What starts at zero does not stop the gradient of what makes it."""
    batch = latents, TIME, text, negative
    found = gradients(Student(fresh, denoiser), *batch, refresh=components.refresh(latents))
    assert not [n for n, g in found.items() if g is None]
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    optimizer.step()
    made = guided(denoiser, fresh, latents, text, negative)
    assert not torch.equal(made, plain(denoiser, latents, text))


def test_a_training_step_in_mixed_precision(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any, negative: Any
) -> None:
    student, refresh = Student(trained, denoiser), components.refresh(latents)
    given = latents, TIME, text, negative, torch.tensor([3.0, 7.5]), refresh
    with torch.autocast("cpu", torch.bfloat16):
        made = student(*given)
    expected = student(*given)
    assert (made.float() - expected).norm() < 0.1 * expected.norm()
    made.float().square().mean().backward()
    assert not [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]


def test_gradient_checkpointing_changes_no_gradient(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any, negative: Any
) -> None:
    """Blocks run again when the guided pass is closed, in whichever thread."""
    student, batch = Student(trained, denoiser), (latents, TIME, text, negative)
    expected = gradients(student, *batch)
    denoiser.enable_gradient_checkpointing(checkpoint_in_pass)
    denoiser.train()
    found = gradients(student, *batch)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


# -- files and signatures ----------------------------------------------------------------------


def test_saved_and_loaded_a_guide_is_the_same(
    denoiser: Any, trained: TinyGuide, latents: torch.Tensor, text: Any, negative: Any,
    tmp_path: Path, family: components.Family,
) -> None:  # fmt: skip
    trained.save_pretrained(tmp_path)
    loaded = Guide.from_pretrained(tmp_path)
    assert loaded.settings() == trained.settings()
    loaded.check(Backbone.of(denoiser).signature(family.prediction_type))
    made = guided(denoiser, loaded, latents, text, negative)
    expected = guided(denoiser, trained, latents, text, negative)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


def test_the_signature_holds_every_site(denoiser: Any, family: components.Family) -> None:
    signature = Backbone.of(denoiser).signature(family.prediction_type)
    modules = set(dict(denoiser.named_modules()))
    for sites in (
        [name for name, _ in signature["attention"]],
        signature["modulation"],
        [name for name, _ in signature["layers"]] + [signature["head"]["module"]],
    ):
        assert set(sites) <= modules
        assert len(set(sites)) == len(sites)
    assert signature == Backbone.of(family.denoiser(seed=1)).signature(family.prediction_type)


def test_a_denoiser_of_another_shape_is_refused(
    family: components.Family, denoiser: Any, fresh: TinyGuide
) -> None:
    for config in family.others:
        other = Backbone.of(family.denoiser(**config))
        sentence = refusal(fresh, other.signature(family.prediction_type))
        assert ": guide " in sentence
        assert ", denoiser " in sentence


def test_a_denoiser_of_another_family_is_refused(
    family: components.Family, fresh: TinyGuide
) -> None:
    for kind in components.FAMILIES.values():
        if kind is not family:
            other = kind.denoiser()
            backbone = Backbone.of(other)
            sentence = refusal(fresh, backbone.signature(kind.prediction_type))
            assert f"family: guide {fresh.config.signature['family']}, denoiser" in sentence
            if {*fresh.target_modules, *fresh.extrapolated} - {*dict(other.named_modules())}:
                with pytest.raises(GuideError, match="this denoiser has no"):
                    backbone.install(fresh)
            assert count_hooks(backbone.denoiser) == 0


def test_another_prediction_type_or_version_is_refused(
    family: components.Family, denoiser: Any, fresh: TinyGuide
) -> None:
    signature = Backbone.of(denoiser).signature(family.prediction_type)
    fresh.check(signature)
    other = {"epsilon": "v_prediction", "flow": "epsilon"}[family.prediction_type]
    sentence = refusal(fresh, signature | {"prediction_type": other})
    assert f"prediction_type: guide {family.prediction_type}, denoiser {other}" in sentence
    assert "version: guide 1, denoiser 2" in refusal(fresh, signature | {"version": 2})
    assert "depth: guide None, denoiser 3" in refusal(fresh, signature | {"depth": 3})


@pytest.mark.parametrize("guide_class", [ExternalGuide, FullGuide])
def test_the_papers_guides_need_a_unet(
    family: components.Family, denoiser: Any, guide_class: type[Guide]
) -> None:
    if Backbone.of(denoiser).family == "unet":
        return
    with pytest.raises(GuideError, match="use the tiny guide") as caught:
        guide_class.for_denoiser(denoiser, family.prediction_type)
    assert "\n" not in str(caught.value)


def refusal(guide: Guide, signature: dict[str, Any]) -> str:
    """The sentence with which a signature is refused."""
    with pytest.raises(GuideError, match="made for another denoiser") as caught:
        guide.check(signature)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_added_to_the_text_is_as_wide_as_the_text() -> None:
    """PixArt projects its text: the addition comes before, the extrapolation after."""
    denoiser = components.pixart_transformer(caption_channels=24)
    z = components.FAMILIES["pixart"].latents(2)
    text, negative = (TextConditions(torch.randn(2, 5, 24)) for _ in range(2))
    guide = FixedGuide(GuideOutput(text=torch.ones(1, 1, 24)))
    made = guided(denoiser, guide, z, text, negative)
    expected = plain(denoiser, z, TextConditions(text.embeds + 1))
    torch.testing.assert_close(made, expected)
