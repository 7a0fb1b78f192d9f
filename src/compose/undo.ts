/** What was opened for a while is ended again in the opposite order. */

/** Run last to first. */
export type Undo = (() => Promise<void> | void)[];

/** Runs `open`, and gives what it made a `close` that undoes it; where it fails, what was begun is undone. */
export async function opened<Made extends object>(
  open: (undo: Undo) => Promise<Made>,
): Promise<Made & { close(): Promise<void> }> {
  const undo: Undo = [];
  const close = async (): Promise<void> => {
    for (const step of undo.splice(0).reverse()) await step();
  };
  try {
    return { ...(await open(undo)), close };
  } catch (error) {
    await close();
    throw error;
  }
}
