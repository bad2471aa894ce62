"""Send the log of a run to wandb (Weights & Biases)."""

from configurator import UserError


class Tracker:
    """Start wandb's run, or continue the one with the id `run_id`; `id` is its id.

    settings: train.py's, with wandb_project and wandb_run_name. Raises UserError if wandb does
    not start. Later failures of wandb are warnings, and the run goes on without it.
    """

    def __init__(self, settings, run_id=None):
        try:
            import wandb

            self.run = wandb.init(project=settings['wandb_project'],
                                  name=settings['wandb_run_name'], config=settings,
                                  id=run_id, resume='allow' if run_id else None)
        except Exception as error:  # of many kinds: no package, no key, no network, a wrong id
            why = str(error).strip().partition('\n')[0]
            raise UserError(f'wandb_log=True: wandb does not start ({type(error).__name__}: '
                            f'{why}); run "wandb login", or set WANDB_MODE=offline, or leave out '
                            f'--wandb_log') from error
        self.id = self.run.id

    def log(self, record):
        """Send a record of log.jsonl."""
        self.attempt(lambda: self.run.log(record, step=record['step']))

    def finish(self):
        """Wait until wandb has everything."""
        self.attempt(lambda: self.run.finish())

    def attempt(self, function):
        """Call a function of wandb's run, unless one has failed before."""
        try:
            if self.run:
                function()
        except Exception as error:  # of many kinds, such as its helper process being gone
            self.run = None
            print(f'WARNING: wandb gets nothing more of this run ({type(error).__name__}: {error})')
