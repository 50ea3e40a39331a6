"""Checkpoints from and to other tools: export, import, merge, compare. Off the training path.

    checkpoint         a committed checkpoint, opened for a long read (tensors, checkpoint_parts)
    atomic_target      a target that appears whole or not at all
    torch_file, dcp_directory, safetensors_out
                       the formats that export writes
    incoming           a foreign checkpoint as a tree of tensors and values (directories, file_kinds; pt_in,
                       dcp_in, safetensors_in, weights_in, deepspeed_in, trainer_in; elsewhere refuses others)
    recognise          the model, optimizer and progress in that tree (parameter_names, marker, flattened)
    foreign_optimizer  a foreign optimizer under our parameter names (numbering, module_order)
    model_kinds        plug-ins that convert models known by name, such as the example's GPT-2
    publish            a new committed checkpoint from a draft (adopt, merge)

Everything streams: memory holds a few tens of MB of tensors at a time, or one whole tensor where it must be
transposed or pickled in one piece.
"""
