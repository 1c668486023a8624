"""Every field of every family's config.json is read, refused by name, or known to change nothing that is computed."""

import collections
import copy
import json
import pathlib

import transformers
from absl.testing import absltest, parameterized
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dialog_jax.errors import UserError
from dialog_jax.model import families, hf_config

_REFERENCES = pathlib.Path(__file__).parents[1] / "references"
_FILE = pathlib.Path("config.json")

# What changes no computation of a language model: names, token ids, initial values, switches of caches and outputs.
_HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "pretraining_tp"),
    *("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"),
    "router_aux_loss_coef",  # of a loss that output_router_logits turns on, which is refused
    "num_nextn_predict_layers",  # layers that transformers does not run
}
# Of layers that a supported model of the family does not have.
_OTHER_LAYERS = "mamba_"
_UNUSED = {
    "granitemoehybrid": {"num_experts_per_tok", "output_router_logits", "intermediate_size", "time_step_limit"},
    # The pattern is in layer_types.
    "gemma3_text": {"_sliding_window_pattern"},
    # Of experts, inputs of each layer and layers without keys: what turns these on (enable_moe_block,
    # hidden_size_per_layer_input, num_kv_shared_layers) is refused.
    "gemma4_text": {
        *("num_experts", "top_k_experts", "moe_intermediate_size", "vocab_size_per_layer_input"),
        "use_double_wide_mlp",
    },
    "gemma4_unified_text": {"use_double_wide_mlp"},
}


class _Recorder(collections.UserDict):
    """Records which fields are read."""

    def __init__(self, fields):
        self.read = set()
        super().__init__(fields)

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.read.add(name)
        return super().get(name, default)


def _example(family):
    """The fields of a reference of the family."""
    for directory in sorted(_REFERENCES.glob("tiny_*/")):
        fields = json.loads((directory / "config.json").read_text())
        if fields["model_type"] == family:
            return fields
    raise AssertionError(f"no reference is a {family} model")


def _complete(family):
    """The fields of a reference and all that transformers adds."""
    fields = {name: value for name, value in _example(family).items() if name != "time_step_limit"}
    return CONFIG_MAPPING[family].from_dict(fields).to_dict()


def _read(family, fields):
    """The fields that are read of a complete config.json."""
    recorder = _Recorder(fields)
    record = families.FAMILIES[family]
    record.read(recorder)
    if record.layer_rotary:
        record.layer_rotary(recorder)
    return recorder.read


class FieldsTest(parameterized.TestCase):
    @parameterized.parameters(*families.FAMILIES)
    def test_every_field_of_transformers_is_read_refused_or_harmless(self, family):
        record = families.FAMILIES[family]
        fields = _complete(family)
        own = fields.keys() - transformers.PretrainedConfig().to_dict().keys()
        known = (
            _read(family, fields)
            | record.fields
            | hf_config.READ
            | record.needed.keys()
            | hf_config.NEEDED.keys()
            | _HARMLESS
        )
        unknown = own - known - _UNUSED.get(family, set())
        self.assertEmpty({name for name in unknown if not name.startswith(_OTHER_LAYERS)})

    @parameterized.parameters(*families.FAMILIES)
    def test_fields_that_a_family_declares_are_those_that_it_reads(self, family):
        fields = _complete(family)
        declared = families.FAMILIES[family].fields
        undeclared = _read(family, fields) - declared - hf_config.READ
        self.assertEmpty(undeclared & (hf_config.NEEDED.keys() | families.FAMILIES[family].needed.keys()))

    @parameterized.parameters(*families.FAMILIES)
    def test_value_that_is_not_supported_is_refused_by_name(self, family):
        record, example = families.FAMILIES[family], _example(family)
        for name, values in {**hf_config.NEEDED, **record.needed}.items():
            if name in record.fields:
                continue
            other = {"layer_types": ["linear_attention"]}.get(name, 0.37)
            self.assertNotIn(other, values)
            with self.assertRaisesRegex(UserError, f"config.json: {name} is "):
                hf_config.from_json(_FILE, example | {name: other})

    # transformers 4 has no ministral3 and gemma4, and transformers 5 reads only one RoPE of its spelling of olmo3.
    @parameterized.parameters(
        *sorted(families.FAMILIES.keys() - {"ministral3", "olmo3", "gemma4_text", "gemma4_unified_text"})
    )
    def test_what_is_written_is_read_in_the_spelling_of_transformers_4_alone(self, family):
        config = hf_config.from_json(_FILE, _example(family))
        fields = hf_config.to_json(config)
        del fields["rope_parameters"]
        given = copy.deepcopy(fields)
        self.assertEqual(hf_config.from_json(_FILE, fields), config)
        self.assertEqual(fields, given)  # transformers changes what it is given

    def test_longrope_has_the_three_fields_that_transformers_4_allows(self):
        fields = hf_config.to_json(hf_config.from_json(_FILE, _example("phi3")))
        self.assertEqual(fields["rope_scaling"].keys(), {"type", "short_factor", "long_factor"})

    @parameterized.parameters(
        ("llama", "num_attention_heads"),
        ("granite", "logits_scaling"),
        ("gemma2", "query_pre_attn_scalar"),
        ("qwen3_moe", "decoder_sparse_step"),
    )
    def test_zero_that_is_divided_by_is_an_error_that_names_the_file(self, family, field):
        with self.assertRaisesRegex(UserError, r"config.json: .*(zero|0\.0)"):
            hf_config.from_json(_FILE, _example(family) | {field: 0})

    def test_value_that_transformers_adds_and_is_not_supported_is_refused_by_name(self):
        fields = _example("gemma4_text")
        del fields["hidden_size_per_layer_input"]
        with self.assertRaisesRegex(UserError, "config.json: hidden_size_per_layer_input is 256"):
            hf_config.from_json(_FILE, fields)

    @parameterized.parameters(
        {"0": {"head_dim": 16}},
        {"1": {"head_dim": 16}},
        {"1": {"head_dim": 16}, "3": {"head_dim": 16, "num_key_value_heads": 1}},
        {"1": {"sliding_window": 3}, "3": {"sliding_window": 3}},
    )
    def test_layers_of_a_type_that_differ_are_refused(self, **layers):
        with self.assertRaisesRegex(UserError, "per_layer_config is .*the same for all layers"):
            hf_config.from_json(_FILE, _example("gemma4_text") | {"per_layer_config": layers})

    @parameterized.parameters("fp8", "gptq", "awq", "bitsandbytes")
    def test_quantized_checkpoint_is_refused_by_name(self, method):
        for family in families.FAMILIES:
            with self.assertRaisesRegex(UserError, f"quantization_config is .*{method}"):
                hf_config.from_json(_FILE, _example(family) | {"quantization_config": {"quant_method": method}})


if __name__ == "__main__":
    absltest.main()
