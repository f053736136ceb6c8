"""What a training run needs, before any GPU hour is spent: memory, time, layouts, and a rehearsal at full size."""
