"""Named in Megatron's annotations."""


class FusibleOperation:
    pass


class Sequential:
    pass
