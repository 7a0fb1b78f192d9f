/**
 * As `Promise.all`, but fails only when all of them have ended: in a transaction, what one of them went on to ask after
 * another has failed would be asked outside of it.
 *
 * @throws what the first of them to fail did
 */
export async function together<const Actions extends readonly unknown[]>(
  actions: Actions,
): Promise<{ -readonly [Nth in keyof Actions]: Awaited<Actions[Nth]> }> {
  const failures: unknown[] = [];
  const values = await Promise.all(
    actions.map(async (action) => {
      try {
        // Once each: a query of Drizzle's is carried out as often as it is awaited.
        return await action;
      } catch (error) {
        failures.push(error);
      }
    }),
  );
  if (failures.length > 0) throw failures[0];
  return values as { -readonly [Nth in keyof Actions]: Awaited<Actions[Nth]> };
}
