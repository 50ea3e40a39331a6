"""The example's model: recognises, converts, exports and loads a GPT-2.

    kind             the interface to the library's import and export       (engine.convert.model_kinds)
    tensors          finds a GPT-2 among tensors and converts its layout    (settings)
    hf_export        --format hf                                            (tokenizer_files)
    resumable        what the trainer expects in an imported checkpoint     (settings)
    load_model       loads a model into memory                              (sample)
    own_packages     makes `model` and `data` mean the example's packages

It belongs to the trainer: the library does not import it.
"""
