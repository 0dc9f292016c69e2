"""The glue to diffusers; the only folder that uses its private names.

families: the table of models. clock: the time of a call. hooks: from a call to the payload. install: processors on and
off. spec: what is attached to a layer, and the decision what it runs. image, joint, flux: the processors. backend: exact
attention as the user set it. registry: side effects of the import.
"""
