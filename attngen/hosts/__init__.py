"""The glue to diffusers; the only folder that uses its private names.

families: the table of models. clock: the time of a call. hooks: from a call to the payload. install: installing and
removing. spec: the part of a patch on a layer, and the decision what the layer runs. image, joint, flux: processors.
backend: exact attention as the user set it. registry: side effects of the import.
"""
