/** A real headless Chromium: the one of the npm package, or the one that CHROMIUM_PATH names. */
import packagedChromium from '@sparticuz/chromium';
import { type Browser, chromium } from 'playwright-core';

/** It is one process: closing one of its contexts ends it, so that pages stay until the browser is closed. */
export async function launchChromium(extraArgs: readonly string[] = []): Promise<Browser> {
  return await chromium.launch({
    executablePath: process.env.CHROMIUM_PATH ?? (await packagedChromium.executablePath()),
    headless: true,
    args: [
      ...packagedChromium.args,
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      '--no-first-run',
      ...extraArgs,
    ],
  });
}
