"""torch's default dtype changes nothing that is trained, stored or computed."""

import pytest
import torch
from peft import PeftModel


@pytest.fixture
def default_dtype():
    """``default_dtype(dtype)``: for the rest of the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("range_estimator", ["minmax", "lp"])
def test_the_adapter_is_the_same(
    range_estimator, wanted, default_dtype, make_base, make_peft, logits_of, batch_for, tmp_path
):
    def made():
        torch.manual_seed(1)
        model = make_peft(range_estimator=range_estimator, init_weights=False)
        model(**batch_for()).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        return model, gradients, logits_of(model)

    make_base()  # its weights are drawn at the first call
    model, gradients, logits = made()
    default_dtype(wanted)
    other, others, again = made()
    assert {p.dtype for p in other.parameters() if p.requires_grad} == {torch.float32}
    expected = model.state_dict()
    for name, tensor in other.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(again, logits)
    assert all(map(torch.equal, others, gradients))
    other.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(make_base(), tmp_path).eval()), logits)
