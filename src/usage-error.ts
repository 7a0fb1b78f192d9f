/** The command was typed wrongly; its help would have told. */
export class UsageError extends Error {}
