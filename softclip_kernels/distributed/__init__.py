"""Everything that communicates. See docs/distributed.md for the global batch, docs/two_pass.md for two-pass training.

exchange       what `group=` says, and where this rank's rows lie in the global batch
agreement      before an exchange: that every rank can make it, with operands that fit
failures       when an exchange fails: which rank is missing, or failed, and with what
laps           the exchanges: every rank's columns shown to every rank, by gather or ring
sharded        the statistics of this rank's rows against all columns, a visiting block at a time
two_pass       large batches on little memory: encode twice (GradCache)
micro_batches  a batch cut into micro-batches: by number, size or a budget of tokens
accumulation   how each framework is told that more micro-batches follow
averaging      gradients averaged over ranks, where no framework does it
replay         random numbers and autocast of the first pass, for the second
outputs        what a model returns for every micro-batch, checked and joined
nested         tensors in nested containers, by path
torch_private  what is used of PyTorch beyond its public interface
whole          for checks: what is spread over ranks or held by a wrapper, whole on every rank
"""
