"""The folder that an app bundles, and manifest.json, its table of contents.

    anchor.mlpackage  retriever.mlpackage     the two models
    tokenizer/        retriever/              their tokenizers' files
    bank/             bank.json, tree.safetensors, and the block files that are not left to be downloaded
    manifest.json     what follows; receipt.json: how it was made and what was measured

manifest.json, version 1 (a reader refuses another version):

    format, version, name
    anchor       package; architecture; functions {name: tokens a call takes}; load_block: the name of the
                 function that writes the memory states from inputs, or null; context; vocabulary (ids from there
                 on are padding); inputs, outputs, states {name: {shape, dtype}}, where -1 is the function's
                 tokens; logits: the outputs that, joined along the last axis, are the logits of every token;
                 compression {format: weights}
    memory       mode (state, input), layers, units R, hidden d, block_sizes; null for an anchor without bank.
                 `gate`, `up`, `down` [L, R, d] are states, or inputs of every function. Zeros are no memory.
                 Level l's block fills the units from sum(block_sizes[:l-1]) on.
    retriever    package, tokenizer, inputs, outputs, lengths (allowed token counts), dim; null without bank
    tokenizer, chat_template (null where there is none), eos [ids], sampling {temperature, top_p, top_k,
                 max_tokens}
    bank         folder; remote {url} or null; download {name below the folder: {bytes, sha256}} of the files that
                 are not bundled and lie below that url; null without bank
    files        {name: {bytes, sha256}} of every bundled file but manifest.json and receipt.json

What the caller sees to: position + tokens <= context, where position is that of the call's first token. A call's
missing tokens are filled with any id; what they leave in the cache is never seen, and is written over by the tokens
that do stand there.
"""
