"""The glue to diffusers; the only folder that uses its private names.

family: what a row has. families: the table of models. rows: those of the core host. register: rows of the user's own.
clock: the time of a call. hooks: from a call to the payload. install: installing and removing. spec: the part of a
patch on a layer, and the decision what the layer runs. image, joint, flux: processors of the layer host. core: from a
model's own product to the route. calls: the call that a layer of the core host is in. backend: exact attention as the
user set it. registry: side effects of the import.
"""
