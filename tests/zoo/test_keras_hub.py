"""keras_hub's backbones and Hugging Face's PyTorch classes of the same sizes: mapped without rules."""

import warnings

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what the library does not find beside it
    import keras_hub
    import transformers as hf

import clipcore as cc

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 90, (2, 9))
MASK = np.ones_like(IDS)
MASK[1, 6:] = 0
KINDS = np.zeros_like(IDS)
KINDS[:, 5:] = 1


def drawn(rng, name, shape):
    if len(shape) == 1 and name.endswith(("weight", "gamma")):
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(0, 0.3, shape) if len(shape) < 2 else rng.normal(0, (np.prod(shape) / max(shape)) ** -0.5, shape)


def randomised(model, seed):
    rng = np.random.default_rng(seed)
    if isinstance(model, torch.nn.Module):
        for key, tensor in model.eval().state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(np.asarray(drawn(rng, key, tuple(tensor.shape)))))
        return model
    for variable in model.weights:
        variable.assign(drawn(rng, variable.name, tuple(variable.shape)))
    return model


def bert(act):
    config = hf.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=40,
        hidden_act=act,
    )
    target = keras_hub.models.BertBackbone(
        vocabulary_size=99,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        intermediate_dim=37,
        max_sequence_length=40,
    )
    return randomised(hf.BertModel(config), 1), randomised(target, 2)


def gpt2():
    config = hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, n_inner=37)
    target = keras_hub.models.GPT2Backbone(
        vocabulary_size=99,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        intermediate_dim=37,
        max_sequence_length=40,
    )
    return randomised(hf.GPT2Model(config), 1), randomised(target, 2)


class Outputs(torch.nn.Module):
    """Hugging Face's model with the outputs that keras_hub's gives, by its names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        if outputs.get("pooler_output") is None:
            return outputs.last_hidden_state
        return {"sequence_output": outputs.last_hidden_state, "pooled_output": outputs.pooler_output}


BERT = (
    {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": KINDS},
    {"token_ids": IDS, "padding_mask": MASK, "segment_ids": KINDS},
)
GPT2 = ({"input_ids": IDS, "attention_mask": MASK}, {"token_ids": IDS, "padding_mask": MASK})
# keras_hub's BERT has GELU's approximation by tanh, which Hugging Face calls gelu_new
PAIRS = {"BERT": (lambda: bert("gelu_new"), *BERT), "GPT-2, which has q, k and v in one": (gpt2, *GPT2)}


def assert_mapped(source, target, sample, target_sample):
    plan = cc.plan(source, target, sample=sample, target_sample=target_sample)
    assert {row.evidence for row in plan.rows} == {"proven"}, str(plan)
    cc.migrate(source, target, plan=plan)
    check = cc.verify(source, target, sample=sample, plan=plan, target_sample=target_sample)
    assert check.ok, check
    assert check.max_rel_error <= 1e-5


@pytest.mark.parametrize("name", PAIRS)
def test_hugging_face_goes_to_keras_hub(name):
    make, sample, target_sample = PAIRS[name]
    source, target = make()
    assert_mapped(Outputs(source), target, sample, target_sample)


@pytest.mark.parametrize("name", PAIRS)
def test_keras_hub_goes_to_hugging_face(name):
    make, sample, target_sample = PAIRS[name]
    target, source = make()
    assert_mapped(source, Outputs(target), target_sample, sample)


def test_the_two_forms_of_gelu_are_told_apart_in_every_block():
    source, target = bert("gelu")
    source = Outputs(source)
    cc.migrate(source, target, sample=BERT[0], target_sample=BERT[1])
    check = cc.verify(source, target, sample=BERT[0], target_sample=BERT[1], explain=True)
    assert not check.ok
    assert {(d.layer, d.source, d.target) for d in check.differences if d.tested} == {
        (f"transformer_layer_{block}/feedforward_output_dense", "gelu", "gelu_tanh") for block in (0, 1)
    }
