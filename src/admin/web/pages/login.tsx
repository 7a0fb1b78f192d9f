/** Exchanges the admin token for a session. */
import { useEffect, useRef, useState } from 'preact/hooks';
import { api } from '../api.ts';
import { Trouble } from '../parts/bits.tsx';
import { ThemeSwitch } from '../parts/theme-switch.tsx';

export function LoginPage({ trouble, onLogin }: { trouble: string | null; onLogin: () => Promise<void> }) {
  const field = useRef<HTMLInputElement>(null);
  const [refusal, setRefusal] = useState<string | null>(null);
  const [isBusy, setIsBusy] = useState(false);

  useEffect(() => field.current?.focus(), []);

  const logIn = async (event: Event): Promise<void> => {
    event.preventDefault();
    setIsBusy(true);
    try {
      await api.login(field.current!.value.trim());
      await onLogin();
    } catch (error) {
      setRefusal((error as Error).message);
      field.current?.select();
    } finally {
      setIsBusy(false);
    }
  };
  return (
    <main class="login">
      <form class="card" onSubmit={logIn}>
        <h1>
          <strong>Keygate</strong> inspector
        </h1>
        <label>
          Admin token
          <input ref={field} type="password" autocomplete="current-password" spellcheck={false} required />
        </label>
        <Trouble text={refusal ?? trouble} />
        <button type="submit" class="primary" disabled={isBusy}>
          {isBusy ? 'Logging in…' : 'Log in'}
        </button>
        <p class="quiet">
          It is the value of <code>ADMIN_TOKEN</code>. A gateway that runs on its own store makes one at its
          first start; its log names the file.
        </p>
      </form>
      <ThemeSwitch />
    </main>
  );
}
