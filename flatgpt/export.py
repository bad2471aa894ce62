"""
Export a trained model as a folder in Hugging Face's layout.

The folder has config.json, safetensors, tokenizer.json, generation_config.json.

    $ python -m flatgpt.export --out_dir=out-shakespeare-char --out=my-gpt
    $ python -m flatgpt.export --which=last --dtype=bfloat16 --out=my-gpt
    $ python -m flatgpt.export --out_dir=out-8b --consolidate --out=out-8b-whole

transformers loads the folder and computes the same logits. Models with learned
positions, LayerNorm and GELU get GPT-2's layout. Models with RoPE, RMSNorm and
SwiGLU, such as --preset=llama, get Llama's, or Qwen's with QK-norm. An option
that neither layout has, such as logit_softcap, is refused by name.

--consolidate writes a run's folder instead: ckpt.pt in one file, with all
tensors of a sharded checkpoint (train.py --shard), moments included.
"""

import os
from typing import Literal

import torch

from configurator import Count, UserError, fit, override
from flatgpt import checkpoint, files, huggingface, output
from flatgpt.pretrained import checkpoint_path, open_model

output.protect()

# Settings -----------------------------------------------------------------------------------------
init_from = 'resume'  # the run in out_dir; or a folder, a hub id, 'gpt2' to 'gpt2-xl'
out_dir = 'out'  # where train.py wrote ckpt.pt and best.pt
which: Literal['best', 'last'] | Count = 'best'  # best.pt if there is one; ckpt.pt; ckpt-STEP.pt
out = ''  # the folder to write; it must not exist yet
dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # precision of the written weights
consolidate = False  # write out/ckpt.pt, a checkpoint in one file
config = override(globals())
# --------------------------------------------------------------------------------------------------

if not out:
    raise UserError("out='': expected the folder to write, such as --out=my-gpt")

if consolidate:
    path = checkpoint_path(init_from, out_dir, which)
    if path is None or 'dtype' in config.given:
        raise UserError('consolidate=True writes the checkpoint of a run as it is; expected its '
                        'folder, --out_dir=FOLDER, and no --dtype')
    if os.path.exists(out):
        raise UserError(f'{out} exists; name another --out, or remove it')
    state = checkpoint.load(path)
    state.pop('shards', None)
    os.makedirs(out)
    try:
        with files.explain_full_disk(out, 'the checkpoint'):
            checkpoint.save(out, state, is_best=os.path.basename(path) == 'best.pt')
    except UserError:
        os.rmdir(out)
        raise
    print(f'{path}: step {state["iter_num"]}')
    print(f'wrote {os.path.join(out, "ckpt.pt")}: one file, '
          f'{os.path.getsize(os.path.join(out, "ckpt.pt")) / 1e6:.1f} MB')
    raise SystemExit

model, text_tokenizer, chat_template, line = open_model(init_from, out_dir, which)
print(line)
described = text_tokenizer.to_dict()
hf = huggingface.save(model, described, chat_template, out, getattr(torch, dtype))
size = sum(os.path.getsize(os.path.join(out, file)) for file in os.listdir(out))
print(fit(f'wrote {out}: {hf["architectures"][0]}, {model.get_num_params(False) / 1e6:.2f}M '
          f'parameters in {dtype}, {text_tokenizer.kind} tokenizer, {size / 1e6:.1f} MB'))
print(f"""next:
  in Python:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained({out!r})
    tokenizer = AutoTokenizer.from_pretrained({out!r})
  to serve it:
    vllm serve {out}
  for llama.cpp; its script needs a published vocabulary, such as GPT-2's:
    python convert_hf_to_gguf.py {out} --outfile {out}.gguf""")
