"""Maps this model's parameters to those of Hugging Face's `GPT2LMHeadModel`.

| here (d = n_embd, i = block)            | shape here      | Hugging Face        | shape there     |
|-----------------------------------------|-----------------|---------------------|-----------------|
| transformer.wte.weight                  | [vocab_size, d] | the same name       | the same        |
| transformer.wpe.weight                  | [block_size, d] | the same name       | the same        |
| transformer.h.{i}.ln_1.weight, .bias    | [d]             | the same name       | the same        |
| transformer.h.{i}.attn.c_attn.weight    | [3 d, d]        | the same name       | [d, 3 d]        |
| transformer.h.{i}.attn.c_attn.bias      | [3 d]           | the same name       | the same        |
| transformer.h.{i}.attn.c_proj.weight    | [d, d]          | the same name       | transposed      |
| transformer.h.{i}.attn.c_proj.bias      | [d]             | the same name       | the same        |
| transformer.h.{i}.ln_2.weight, .bias    | [d]             | the same name       | the same        |
| transformer.h.{i}.mlp.c_fc.weight       | [4 d, d]        | the same name       | [d, 4 d]        |
| transformer.h.{i}.mlp.c_fc.bias         | [4 d]           | the same name       | the same        |
| transformer.h.{i}.mlp.c_proj.weight     | [d, 4 d]        | the same name       | [4 d, d]        |
| transformer.h.{i}.mlp.c_proj.bias       | [d]             | the same name       | the same        |
| transformer.ln_f.weight, .bias          | [d]             | the same name       | the same        |
| (tied: transformer.wte.weight)          |                 | lm_head.weight      | [vocab_size, d] |

The transposed weights belong to `Conv1D` there, which computes x @ W where `nn.Linear` computes x @ W.T.
`lm_head.weight` is an alias there and usually not in files; OpenAI's original files also omit the prefix
`transformer.`.
"""

from __future__ import annotations

import re

_BLOCK = r"transformer\.h\.(?:0|[1-9]\d*)\."
_LINEAR = r"(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
_TRANSPOSED = re.compile(rf"{_BLOCK}{_LINEAR}\.weight")
_SAME = re.compile(
    rf"transformer\.(?:wte|wpe)\.weight|transformer\.ln_f\.(?:weight|bias)"
    rf"|{_BLOCK}ln_[12]\.(?:weight|bias)|{_BLOCK}{_LINEAR}\.bias"
)


def hf_name(name: str) -> tuple[str, bool]:
    """Return Hugging Face's name of parameter `name`, and whether it is stored transposed there.

    Raises:
        KeyError: this model has no such parameter.
    """
    if _TRANSPOSED.fullmatch(name):
        return name, True
    if _SAME.fullmatch(name):
        return name, False
    raise KeyError(f"{name!r} is not a parameter of this GPT-2")
