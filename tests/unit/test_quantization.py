"""What a config says of quantized weights: which modules, in which groups. What is refused: test_broken_checkpoints."""

from __future__ import annotations

import pytest

from folovllm.model.quantization import QuantizationConfig, Scheme, read_quantization, settle_quantization

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"


def gptq(**changes) -> QuantizationConfig:
    return read_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, **changes}})


def compressed(ignore=(), **groups) -> QuantizationConfig:
    found = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": list(ignore)}
    return read_quantization({"quantization_config": {**found, "config_groups": groups}})


def group(*targets, size=128, **changes) -> dict:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size, **changes}
    return {"targets": list(targets), "weights": weights}


class TestGptq:
    def test_its_fields(self):
        config = gptq(sym=False, desc_act=True)
        assert (config.method, config.version) == ("gptq", 1)
        assert config.scheme(UP) == Scheme(128, symmetric=False, desc_act=True)
        assert not config.scheme("a").symmetric and gptq(sym=True).scheme("a").symmetric

    @pytest.mark.parametrize("name", ["checkpoint_format", "format"])
    def test_its_version(self, name):
        assert gptq(**{name: "gptq_v2"}).version == 2 and gptq(**{name: "gptq"}).version == 1
        assert gptq(**{name: None}).version == 1

    def test_an_order_of_whole_columns_is_none(self):
        assert gptq(group_size=-1, desc_act=True).scheme(UP) == Scheme(-1, symmetric=True, desc_act=False)

    def test_settings_of_its_own_for_some_modules(self):
        config = gptq(dynamic={r"-:.*\.0\.": {}, r"+:.*down_proj": {"group_size": 32}, ".*_proj": {"sym": False}})
        assert config.scheme(UP) is None
        assert config.scheme(DOWN).group_size == 32
        assert config.scheme("model.layers.1.mlp.up_proj") == Scheme(128, symmetric=False, desc_act=False)
        assert config.scheme(HEAD) == Scheme(128, symmetric=True, desc_act=False)

    def test_it_names_itself(self):
        assert str(gptq()) == "gptq, 4 bits in groups of 128"
        assert str(gptq(group_size=-1)) == "gptq, 4 bits in whole columns"


class TestCompressedTensors:
    def test_its_fields(self):
        config = compressed(group_0=group("Linear", symmetric=False, actorder="group"))
        assert config.scheme(UP) == Scheme(128, symmetric=False, desc_act=True)
        assert compressed(group_0=group("Linear", strategy="channel")).scheme(UP).group_size == -1
        assert not compressed(group_0=group("Linear", actorder="weight")).scheme(UP).desc_act

    @pytest.mark.parametrize("said, means", [("GROUP", True), ("dynamic", True), (True, True), ("static", False)])
    def test_other_names_of_an_order(self, said, means):
        assert compressed(group_0=group("Linear", actorder=said)).scheme(UP).desc_act is means

    def test_an_order_that_nobody_knows(self):
        message = r"weights\.actorder must be null or one of group, dynamic, true, weight, static, false, got 'random'"
        with pytest.raises(ValueError, match=message):
            compressed(group_0=group("Linear", actorder="random"))

    @pytest.mark.parametrize("ignore", ["lm_head", "re:.*head", "re:lm_.*"])
    def test_what_it_ignores(self, ignore):
        config = compressed([ignore], group_0=group("Linear"))
        assert config.scheme(HEAD) is None and config.scheme(UP)

    def test_a_name_means_the_module_and_no_part_of_a_name(self):
        config = compressed([UP, "down_proj"], group_0=group("Linear"))
        assert config.scheme(UP) is None
        assert config.scheme(DOWN) and config.scheme("model.layers.0.mlp.gate_up_proj") and config.scheme(f"{UP}.inner")

    def test_a_name_goes_before_a_class(self):
        config = compressed(group_0=group("Linear"), group_1=group("re:.*down_proj", UP, size=32))
        assert [config.scheme(name).group_size for name in (UP, DOWN, HEAD)] == [32, 32, 128]
        assert str(config) == "compressed-tensors, 4 bits in groups of 32 or groups of 128"

    def test_a_name_goes_before_a_pattern(self):
        config = compressed(group_0=group("re:.*_proj"), group_1=group(UP, size=32))
        assert [config.scheme(name).group_size for name in (UP, DOWN)] == [32, 128]

    def test_what_no_target_names(self):
        assert compressed(group_0=group("re:.*up_proj")).scheme(DOWN) is None


class TestWhere:
    @pytest.mark.parametrize("raw", [{}, {"quantization_config": None}, {"compression_config": {}}, {"text_config": 3}])
    def test_nothing_is_nothing(self, raw):
        assert read_quantization(raw) is None

    def test_under_another_name_and_inside(self):
        found = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        assert read_quantization({"compression_config": found}) == read_quantization({"quantization_config": found})
        assert read_quantization({"text_config": {"quantization_config": found}}).method == "gptq"

    def test_what_was_asked_for(self):
        found = gptq()
        assert settle_quantization(None, None, "here") is None
        assert settle_quantization(None, found, "here") is settle_quantization("gptq", found, "here") is found
        assert settle_quantization("int8", None, "here") == QuantizationConfig("int8")
        for asked, config in (("int8", found), ("compressed-tensors", found), ("gptq", None)):
            with pytest.raises(ValueError, match="for here, .*got '" + asked):
                settle_quantization(asked, config, "here")


@pytest.mark.parametrize("num_in, size, groups", [(128, 32, 4), (130, 32, 5), (128, -1, 1), (16, 32, 1)])
def test_how_many_groups_a_weight_has(num_in, size, groups):
    assert Scheme(size, symmetric=True, desc_act=False).num_groups(num_in) == groups
