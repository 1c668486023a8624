"""Each finding for figures that have it, and none for those of a healthy run."""

import dataclasses
import math

import numpy as np
from absl.testing import absltest, parameterized

from dialog_jax.diagnosis import findings
from dialog_jax.diagnosis.run_figures import Figures, HeldOutChange, Overlap, ParameterChange, ResponseLosses

_STEPS = 60
_STEP = np.arange(1.0, _STEPS + 1)


def _noise(scale, seed=0):
    return scale * np.random.default_rng(seed).standard_normal(_STEPS)


def _healthy(**changes):
    """A run of three epochs whose losses fall, with figures of everything."""
    figures = Figures(
        updates={
            "step": _STEP,
            "epoch": _STEP / 20,
            "nll": 3.2 + 0.8 * np.exp(-_STEP / 15) + _noise(0.05),
            "gradient_norm": 1.5 + _noise(0.2, 1),
            "learning_rate": 2e-5 * (1 - 0.9 * _STEP / _STEPS),
            "skipped": np.zeros(_STEPS),
            "tokens": np.full(_STEPS, 8000.0),
            "targets": np.full(_STEPS, 3000.0),
            "imbalance": np.full(_STEPS, 1.02),
            "row_tokens_used": np.full(_STEPS, 0.95),
        },
        evaluations={
            "step": np.array([0.0, 20, 40, 60]),
            "loss": np.array([4.0, 3.7, 3.62, 3.6]),
            "targets": np.full(4, 20000.0),
        },
        steps=_STEPS,
        learning_rate=2e-5,
        clip_norm=1.0,
        changes=[ParameterChange("embedding", 100.0, 0.2), ParameterChange("layers/mlp/w_up", 50.0, 0.1)],
        responses=ResponseLosses(responses=200, first=4.5, middle=3.6, end=2.0),
        held_out=HeldOutChange(dialogues=50, tokens=5000, change=-0.4, error=0.05),
        overlap=Overlap(responses=300, shared=1, first=["dialogue 7"]),
    )
    return dataclasses.replace(figures, **changes)


def _updates(**columns):
    return {"updates": {**_healthy().updates, **columns}}


def _evaluations(*loss):
    return {"evaluations": {**_healthy().evaluations, "loss": np.array(loss)}}


_FLAT = 3.5 + _noise(0.05)
_EPOCH = np.ceil(_STEP / 20) - 1

# By finding: the figures of a sick run, its confidence, and what the sentence has to say.
_SICK = {
    "few_targets": (_updates(targets=np.full(_STEPS, 80.0)), "certain", "1.00% of the tokens are trained on, 80 per"),
    "skipped_steps": (_updates(skipped=np.minimum(_STEP, 7)), "certain", "7 of 60 updates were skipped"),
    "learning_rate_zero": (
        _updates(learning_rate=2e-5 * _STEP / 600),
        "certain",
        "never exceeded 2e-06, 10.0% of its peak of 2e-05: the warm-up is longer",
    ),
    "learning_rate_exhausted": (
        _updates(learning_rate=np.where(_STEP <= 40, 2e-5, 1e-8)),
        "certain",
        "in the last 20 of 60 updates the learning rate was below 1% of its peak",
    ),
    "learning_rate_low": (
        _updates(nll=_FLAT) | {"changes": [ParameterChange("embedding", 100.0, 1e-3)]},
        "likely",
        "which is noise, and the parameters by 1.0e-05 of their norm",
    ),
    "learning_rate_high": (
        _updates(nll=3.5 + 0.02 * _STEP, gradient_norm=0.1 * _STEP) | _evaluations(4.0, 4.5, 5.0, 5.6),
        "likely",
        r"rose from 4.0000 to 5.6000, .* factor of 8.\d+, and the training loss rose as well",
    ),
    "always_clipped": (
        _updates(gradient_norm=20 + _noise(1.0)),
        "possible",
        "100% of the updates are clipped; the median gradient norm is 20.* optimizer.clip_norm is 1",
    ),
    "no_gradient": (_updates(gradient_norm=np.zeros(_STEPS)), "certain", "exactly 0 in 60 of 60 updates"),
    "unmoved_parameters": (
        {"changes": [ParameterChange("embedding", 9.0, 0.1), ParameterChange("layers/mlp/w_up", 50.0, 0.0)]},
        "certain",
        "1 of 2 trained parameters have not changed: layers/mlp/w_up$",
    ),
    "template_mismatch": (
        {"responses": ResponseLosses(responses=200, first=9.0, middle=3.6, end=12.5)},
        "likely",
        "of 200 held-out responses is 9.00 nats at first tokens and 12.50 nats at end-of-turn tokens, against 3.60",
    ),
    "data_known": (
        _updates(nll=np.full(_STEPS, 0.02)) | _evaluations(0.05, 0.04, 0.03, 0.02),
        "likely",
        "the held-out loss is 0.0500 and the training loss is 0.0200",
    ),
    "contaminated": (
        {"overlap": Overlap(responses=300, shared=90, first=["dialogue 7 (v.jsonl:8)"])},
        "certain",
        r"90 of 300 held-out responses .* same user message: dialogue 7 \(v.jsonl:8\)",
    ),
    "memorizing": (
        _updates(nll=3.5 - 0.6 * _EPOCH - 0.001 * _STEP + _noise(0.05)) | _evaluations(4.0, 3.5, 3.8, 4.1),
        "likely",
        "training loss falls by 0.[56].* at the end of each epoch, and since step 20, held-out loss has risen from 3.5",
    ),
    "held_out_small": (
        {"held_out": HeldOutChange(dialogues=50, tokens=5000, change=-0.4, error=0.8)},
        "likely",
        "held-out loss changed by -0.4000 ± 0.4000 nats, which is no evidence",
    ),
    "waste_padding": (
        _updates(row_tokens_used=np.full(_STEPS, 0.4)),
        "certain",
        "60% of the tokens of rows are padding",
    ),
    "waste_imbalance": (_updates(imbalance=np.full(_STEPS, 1.8)), "certain", "costs the busiest device 1.80 times"),
    "ordering": (
        _updates(nll=_healthy().updates["nll"] + 0.4 * np.sin(2 * np.pi * _STEP / 20)),
        "likely",
        r"repeats a pattern of ±0.\d+ nats in every epoch \(p = 0.0",
    ),
}


class FindingsTest(parameterized.TestCase):
    def test_a_healthy_run_has_none(self):
        for seed in range(8):
            nll = _healthy().updates["nll"] - _noise(0.05) + _noise(0.05, seed)
            found, unchecked = findings.diagnose(_healthy(**_updates(nll=nll)))
            self.assertEmpty(found, f"seed {seed}")
            self.assertEmpty(unchecked)
        self.assertEmpty(findings.format_findings(found, unchecked))

    def test_there_is_a_sick_run_of_each_kind(self):
        self.assertEqual(list(_SICK), list(findings.CHECKS))

    @parameterized.named_parameters((kind, kind, *sick) for kind, sick in _SICK.items())
    def test_a_sick_run_has_its_finding(self, kind, changes, confidence, sentence):
        found, _ = findings.diagnose(_healthy(**changes))
        self.assertIn(kind, found)
        self.assertEqual(found[kind].confidence, confidence)
        self.assertRegex(found[kind].what, sentence)
        others = set(found) - {kind}
        # A loss that hardly falls is also one whose change the held-out set cannot show.
        self.assertEmpty(others - ({"held_out_small"} if kind == "data_known" else set()))

    @parameterized.named_parameters(
        ("a flat loss of parameters that move", _updates(nll=_FLAT), "learning_rate_low"),
        (
            "parameters that hardly move while the loss falls",
            {"changes": [ParameterChange("a", 100.0, 1e-3)]},
            "learning_rate_low",
        ),
        ("held-out loss that rises while training loss falls", _evaluations(4.0, 3.5, 3.8, 4.1), "learning_rate_high"),
        ("norms above the limit", _updates(gradient_norm=3 + _noise(0.2)), "always_clipped"),
        ("a rate that still rises", {**_updates(learning_rate=_STEP / 600 * 2e-5), "steps": 600}, "learning_rate_zero"),
        ("no end of turn", {"responses": ResponseLosses(9, 4.0, 3.6, math.nan)}, "template_mismatch"),
        ("one epoch", _updates(epoch=_STEP / 60, nll=3.5 - 0.6 * _EPOCH), "memorizing"),
        ("no change at all", _evaluations(4.0, 4.1, 4.2, 4.3), "held_out_small"),
        ("unknown epochs", _updates(epoch=np.full(_STEPS, math.nan)), "ordering"),
    )  # fmt: skip
    def test_what_is_no_finding(self, changes, kind):
        self.assertNotIn(kind, findings.diagnose(_healthy(**changes))[0])

    def test_a_run_that_diverges_at_once_has_a_high_rate_and_memorizes_nothing(self):
        # As with LoRA at a rate of 0.1: losses and norms have their peak in the first updates.
        peak = np.exp(-_STEP / 4)
        changes = _updates(nll=np.where(_STEP == 1, 4.2, 12 + 40 * peak), gradient_norm=1.5 + 300 * peak)
        for loss in ((4.0, 50.0, 21.0, 13.0), (4.0, 30.0, 9.0, 5.2)):
            found, _ = findings.diagnose(_healthy(**changes, **_evaluations(*loss)))
            self.assertEqual(list(found), ["learning_rate_high"])
            self.assertEqual(found["learning_rate_high"].confidence, "likely")
            self.assertRegex(found["learning_rate_high"].what, "factor of 0.0.*, and the training loss rose as well")

    def test_what_could_not_be_measured_is_listed_with_the_reason(self):
        missing = {"changes": "the model is not here.", "responses": "the model is not here."}
        figures = _healthy(changes=None, responses=None, overlap=None, missing=missing)
        found, unchecked = findings.diagnose(figures)
        self.assertEmpty(found)
        self.assertEqual(
            findings.format_findings(found, unchecked).splitlines(),
            [
                "not checked: learning_rate_low, unmoved_parameters, template_mismatch: the model is not here.",
                "not checked: contaminated: not measured",
            ],
        )

    def test_the_most_certain_come_first_each_with_its_remedy(self):
        changes = _SICK["ordering"][0] | {"changes": _SICK["unmoved_parameters"][0]["changes"]}
        found, unchecked = findings.diagnose(_healthy(**changes))
        self.assertEqual(list(found), ["unmoved_parameters", "ordering"])
        lines = findings.format_findings(found, unchecked).splitlines()
        self.assertStartsWith(lines[0], "unmoved_parameters (certain): 1 of 2")
        self.assertStartsWith(lines[1], "    Nothing that the loss depends on")

    def test_a_run_of_one_step_and_one_evaluation_can_be_diagnosed(self):
        healthy = _healthy()
        figures = _healthy(
            updates={name: column[:1] for name, column in healthy.updates.items()},
            evaluations={name: column[:1] for name, column in healthy.evaluations.items()},
        )
        self.assertEmpty(findings.diagnose(figures)[0])
        none = {name: column[:0] for name, column in healthy.evaluations.items()}
        self.assertEmpty(findings.diagnose(dataclasses.replace(figures, evaluations=none))[0])


if __name__ == "__main__":
    absltest.main()
