"""What can be tapped of a model, against PyTorch transformers: states, what enters, values, and who attends to whom."""

import jax
import numpy as np
import pytest
import torch

from tests.models import helpers
from tunejax.core import sites
from tunejax.objectives import features

CASES = {
    "llama": ("llama", "lm", helpers.ROPE),
    "qwen3": ("qwen3", "lm", {**helpers.ROPE, "head_dim": 16}),
    "bert": ("bert", "mlm", helpers.SMALL),
}
TAPS = ("hidden", "embedding", "query", "key", "value")


@pytest.mark.parametrize("case", CASES)
def test_taps_equal_pytorch(case):
    model_type, head, changes = CASES[case]
    theirs = helpers.torch_model(model_type, head, **changes)
    model, params, _ = helpers.ours(theirs, head)
    tokens, mask = helpers.ragged()
    batch = helpers.batch(tokens, mask)
    taps = jax.jit(lambda p, b: model.hidden(p, b, taps=TAPS)[1])(params, batch)
    values = []
    for name, module in theirs.named_modules():
        if name.endswith(("v_proj", "self.value")):
            module.register_forward_hook(lambda m, args, out: values.append(out))
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), output_hidden_states=True,
            output_attentions=True,
        )  # fmt: skip
    real = mask > 0
    layers = len(out.attentions)
    np.testing.assert_allclose(taps["embedding"][0][real], out.hidden_states[0].numpy()[real], atol=1e-5)
    # The last of a decoder comes after its final norm there.
    for i in range(layers if case == "bert" else layers - 1):
        np.testing.assert_allclose(taps["hidden"][i][real], out.hidden_states[i + 1].numpy()[real], atol=1e-5)
    where = sites.Where(batch["positions"], batch["segment_ids"])
    seen = sites.mask(where, where, causal=case != "bert")
    for i in range(layers):
        found = np.asarray(taps["value"][i]).reshape(*tokens.shape, -1)
        np.testing.assert_allclose(found[real], values[i].numpy()[real], atol=1e-5)
        attended = np.exp(features._relation(taps, i, "attention", None, seen)).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(attended[real], out.attentions[i].numpy().transpose(0, 2, 1, 3)[real], atol=1e-5)
