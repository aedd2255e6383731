"""Networks of the paper's end-to-end experiments: a ResNet20 whose output H_1 enters an MLP head.

`classifier` is the interface, pure functions of variables and images; `training` descends.
"""
